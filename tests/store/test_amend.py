"""The next attempt of a chunk: only the rows that were done again change, the others stay bit by bit."""

from __future__ import annotations

import pytest
from test_labelset import CHUNKS, fill, make_rows, make_set, store  # noqa: F401 (a fixture)

from vkd.errors import LabelsMissing, VkdError
from vkd.schema import STATUS
from vkd.store import encodings, files, forgotten
from vkd.store.chunkfile import ChunkRows, Reject, content_digest


def digests(table):
    """One digest a row."""
    return [content_digest(table.slice(row, 1)) for row in range(table.num_rows)]


def rows_like(chunk_seed, seed, rejects):
    """Other labels of the same examples."""
    other = make_rows(seed, rejected=tuple(rejects))
    return ChunkRows([f"e{chunk_seed}-{i}" for i in range(5)], rejects, other.labels)


@pytest.mark.parametrize("compacted", [False, True])
def test_only_the_redone_rows_change(store, compacted):  # noqa: F811
    label_set = make_set(store)
    fill(label_set)
    if compacted:
        label_set.compact(0, "s1", 3)
    before = label_set.read(0, CHUNKS[1])
    fresh = rows_like(1, 77, {})
    assert label_set.amend(0, CHUNKS[1], fresh, [1]) == 1
    after = label_set.read(0, CHUNKS[1], verify=True)
    assert label_set.committed(0)[CHUNKS[1]] == 1 and after.schema.equals(before.schema)
    same = [a == b for a, b in zip(digests(before), digests(after), strict=True)]
    assert same == [True, False, True, True, True]
    assert after[STATUS].to_pylist() == ["labelled"] * 5
    assert (encodings.decode(after, "embedding")[1] != 0).any()
    label_set.compact(0, "s1", 3)
    assert label_set.read(0, CHUNKS[1], verify=True).equals(after)


def test_labels_of_rows_that_are_not_redone_are_not_looked_at(store):  # noqa: F811
    label_set = make_set(store)
    fill(label_set)
    fresh = rows_like(0, 5, {})
    fresh.labels["logits"][0] = float("nan")
    fresh.labels["regions"][2] = None
    assert label_set.amend(0, CHUNKS[0], fresh, [1]) == 1


def test_a_label_is_not_given_up_for_a_reject(store):  # noqa: F811
    label_set = make_set(store)
    fill(label_set)
    before = label_set.read(0, CHUNKS[0])
    again = {row: Reject("decode", "timeout", "too slow", False, 4, "pyav") for row in range(5)}
    assert label_set.amend(0, CHUNKS[0], ChunkRows([f"e0-{i}" for i in range(5)], again, {}), [0, 1]) == 1
    after = label_set.read(0, CHUNKS[0], verify=True)
    assert digests(after)[2:] == digests(before)[2:] and digests(after)[0] == digests(before)[0]
    assert (after["reject_kind"][1].as_py(), after["attempts"][1].as_py()) == ("timeout", 4)
    assert label_set.amend(0, CHUNKS[0], ChunkRows([f"e0-{i}" for i in range(5)], again, {}), [0]) == 1


def test_what_was_forgotten_is_not_labelled_again(store):  # noqa: F811
    label_set = make_set(store)
    rows = make_rows(0)
    label_set.write(0, CHUNKS[0], ChunkRows(rows.example_ids, {1: forgotten.REJECT}, rows.labels))
    assert label_set.amend(0, CHUNKS[0], rows_like(0, 5, {}), [0, 1]) == 1
    after = label_set.read(0, CHUNKS[0], verify=True)
    assert after[STATUS].to_pylist() == ["labelled", "rejected", "labelled", "labelled", "labelled"]


def test_a_listing_that_lags_hides_no_attempt(store, monkeypatch):  # noqa: F811
    label_set = make_set(store)
    fill(label_set)
    listed = files.list_infos(f"{label_set.uri}/view=0/s1")
    label_set.amend(0, CHUNKS[0], rows_like(0, 5, {}), [1])
    first = digests(label_set.read(0, CHUNKS[0]))
    monkeypatch.setattr(files, "list_infos", lambda folder: listed)
    assert label_set.committed(0)[CHUNKS[0]] == 0
    assert label_set.amend(0, CHUNKS[0], rows_like(0, 6, {}), [3]) == 2
    after = digests(label_set.read(0, CHUNKS[0], attempt=2))
    assert [a == b for a, b in zip(first, after, strict=True)] == [True, True, True, False, True]


def test_rows_of_another_chunk_are_refused(store):  # noqa: F811
    label_set = make_set(store)
    fill(label_set)
    with pytest.raises(VkdError, match="not those of the stored chunk"):
        label_set.amend(0, CHUNKS[0], rows_like(1, 5, {}), [1])
    with pytest.raises(LabelsMissing, match="is not labelled"):
        label_set.amend(1, CHUNKS[0], rows_like(0, 5, {}), [1])
