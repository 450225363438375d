"""The label store's contract: existence is the commit, and what is read is what was written."""

from __future__ import annotations

import json
import pickle
import uuid

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vkd.errors import ConfigError, LabelsMismatch, LabelsMissing, StorageError, TeacherError, VkdError
from vkd.rounds import Chunk
from vkd.schema import TensorType
from vkd.store import chunkfile, encodings, files
from vkd.store.housekeeping import verify_files
from vkd.store.labelset import ChunkRows, LabelSet, LabelSetSpec, Reject

TENSORS = {
    "logits": TensorType("float32", (20,)),
    "embedding": TensorType("float32", (6,)),
    "regions": TensorType("float32", (None, 2, 3)),
    "frames": TensorType("uint8", (2, 16, 16, 3)),
}
ENCODINGS = {"logits": "topk:4", "embedding": "int8", "frames": "jpeg:90"}
FIELDS = {"teacher": {"name": "net", "version": 1}, "data": {"views": {"seed": 0}, "size_px": 16}}
PROBE = {"logits": np.linspace(-1, 1, 20, dtype=np.float32)[None]}
CHUNKS = [Chunk("s1", 0), Chunk("s1", 1), Chunk("s1", 2), Chunk("s2", 0)]


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}/store"


@pytest.fixture
def local(tmp_path):
    return str(tmp_path / "store")


def make_spec(fields=FIELDS, **changes):
    return LabelSetSpec(**{"alias": "teacher", "fields": fields, "tensors": TENSORS, "encodings": ENCODINGS, **changes})


def make_set(store):
    return LabelSet.create(store, make_spec(), PROBE, {"torch": "2.13"}, {"logits": {"kl_mean": 0.01}})


def make_rows(seed, n=5, rejected=(1,)):
    rng = np.random.default_rng(seed)
    labels = {
        "logits": rng.normal(size=(n, 20)).astype(np.float32),
        "embedding": rng.normal(size=(n, 6)).astype(np.float32),
        "regions": [None if i in rejected else rng.normal(size=(i, 2, 3)).astype(np.float32) for i in range(n)],
        "frames": rng.integers(0, 256, size=(n, 2, 16, 16, 3), dtype=np.uint8),
    }
    rejects = {i: Reject("decode", "missing", "no such file", True, 2) for i in rejected}
    return ChunkRows([f"e{seed}-{i}" for i in range(n)], rejects, labels)


def fill(label_set, view=0):
    for seed, chunk in enumerate(CHUNKS):
        label_set.write(view, chunk, make_rows(seed), num_rows=5)


def chunk_files(store):
    fs, root = fsspec.core.url_to_fs(store)
    return sorted(path.rsplit("/", 1)[-1] for path in fs.find(root) if path.endswith(".parquet"))


def test_what_is_read_is_what_was_written(store):
    label_set = make_set(store)
    rows = make_rows(0)
    label_set.write(0, CHUNKS[0], rows)
    table = label_set.read(0, CHUNKS[0], verify=True)
    assert table["example_id"].to_pylist() == rows.example_ids
    assert table["status"].to_pylist() == ["labelled", "rejected", "labelled", "labelled", "labelled"]
    told = ("reject_stage", "reject_kind", "reject_message", "reject_permanent", "attempts")
    assert [table[name][1].as_py() for name in told] == ["decode", "missing", "no such file", True, 2]
    assert [table[name][0].as_py() for name in told] == [None] * 5
    embedding, regions = encodings.decode(table, "embedding"), encodings.decode(table, "regions")
    assert np.abs(embedding - rows.labels["embedding"])[[0, 2, 3, 4]].max() < 0.02 and (embedding[1] == 0).all()
    assert [len(row) for row in regions] == [0, 0, 2, 3, 4]
    assert encodings.decode(table, "frames").shape == (5, 2, 16, 16, 3)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("compacted", [False, True])
def test_chosen_columns_come_with_their_companions(local, verify, compacted):
    label_set = make_set(local)
    fill(label_set)
    if compacted:
        label_set.compact(0, "s1", 3)
    table = label_set.read(0, CHUNKS[1], ["logits", "regions"], verify=verify)
    assert set(table.column_names) == {*("example_id", "status", "logits", "logits.index", "logits.logsumexp", "regions", "regions.length")}
    assert encodings.decode(table, "logits").shape == (5, 20)


def test_a_chunk_may_be_rejected_as_a_whole(local):
    label_set = make_set(local)
    everything = {i: Reject("decode", "missing", "gone", True) for i in range(3)}
    label_set.write(0, CHUNKS[0], ChunkRows(["a", "b", "c"], everything, {}))
    assert label_set.read(0, CHUNKS[0], verify=True)["logits"].null_count == 3
    assert label_set.summary(0).rejects == {"missing": 3}


def test_existence_is_the_commit_and_resume_is_a_listing(store):
    label_set = make_set(store)
    assert label_set.missing(0, CHUNKS) == CHUNKS and label_set.views() == [] and label_set.committed(0) == {}
    for chunk in (CHUNKS[3], CHUNKS[1]):
        label_set.write(0, chunk, make_rows(0))
    label_set.write(2, CHUNKS[0], make_rows(0))
    again = LabelSet.open(store, make_spec())
    assert again.missing(0, CHUNKS) == [CHUNKS[0], CHUNKS[2]] and again.views() == [0, 2]
    assert again.committed(0) == {CHUNKS[1]: 0, CHUNKS[3]: 0}
    with pytest.raises(LabelsMissing, match="vkd label RUN"):
        again.read(0, CHUNKS[0])


def test_files_that_are_no_chunks_are_ignored(local):
    label_set = make_set(local)
    fill(label_set)
    for name in (".chunk-00009.a0.parquet.123.tmp", "chunk-00009.a0.parquet.tmp", "notes.txt"):
        files.put(f"{label_set.uri}/view=0/s1/{name}", b"x")
    assert sorted(label_set.committed(0)) == sorted(CHUNKS)


def test_a_failed_write_leaves_nothing(local, monkeypatch):
    label_set = make_set(local)
    write_table = pq.ParquetWriter.write_table

    def fails_half_way(self, table, *args, **kwargs):
        write_table(self, table.slice(0, 2), *args, **kwargs)
        raise RuntimeError("worker died")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fails_half_way)
    with pytest.raises(RuntimeError, match="worker died"):
        label_set.write(0, CHUNKS[0], make_rows(0))
    assert chunk_files(local) == [] and label_set.committed(0) == {}


def test_blocks_that_are_not_one_whole_chunk_are_refused(local):
    label_set, rows = make_set(local), make_rows(0)
    with pytest.raises(VkdError, match="5 rows is not the chunk of 8"):
        label_set.write(0, CHUNKS[0], rows, num_rows=8)
    short = {name: value[:3] for name, value in rows.labels.items()}
    with pytest.raises(TeacherError, match="3 rows of values for 5"):
        label_set.write(0, CHUNKS[0], ChunkRows(rows.example_ids, rows.rejects, short))
    with pytest.raises(TeacherError, match="declared are"):
        label_set.write(0, CHUNKS[0], ChunkRows(rows.example_ids, rows.rejects, {"logits": rows.labels["logits"]}))
    with pytest.raises(TeacherError, match="outside"):
        label_set.write(0, CHUNKS[0], ChunkRows(rows.example_ids, {9: rows.rejects[1]}, rows.labels))
    assert chunk_files(local) == []


def test_the_highest_attempt_wins(store):
    label_set = make_set(store)
    label_set.write(0, CHUNKS[0], make_rows(0))
    for attempt in (1, 10, 2):
        label_set.write(0, CHUNKS[0], make_rows(attempt, rejected=()), attempt=attempt)
    assert label_set.committed(0) == {CHUNKS[0]: 10}
    assert label_set.read(0, CHUNKS[0])["example_id"][0].as_py() == "e10-0"
    assert label_set.read(0, CHUNKS[0], attempt=1)["example_id"][0].as_py() == "e1-0"
    assert label_set.summary(0).num_rejected == 0 and label_set.summary(0).num_labelled == 5


def test_summary_reads_footers_only(store, monkeypatch):
    label_set = make_set(store)
    fill(label_set)
    label_set.write(0, CHUNKS[3], make_rows(7, rejected=(0, 2)), attempt=1)
    label_set.compact(0, "s1", 3)
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", None)
    found = label_set.summary(0)
    assert (found.num_chunks, found.num_labelled, found.num_rejected, found.rejects) == (4, 15, 5, {"missing": 5})


def test_a_footer_longer_than_the_first_guess_is_read(local, monkeypatch):
    label_set = make_set(local)
    fill(label_set)
    monkeypatch.setattr(chunkfile, "TAIL_BYTES", 16)
    assert label_set.summary(0).num_chunks == 4


def test_compaction_changes_no_label(store):
    label_set = make_set(store)
    fill(label_set)
    before = [label_set.read(0, chunk) for chunk in CHUNKS]
    label_set.compact(0, "s1", 3)
    assert chunk_files(store) == ["all.parquet", "chunk-00000.a0.parquet"]
    assert label_set.committed(0) == dict.fromkeys(CHUNKS, 0) and label_set.missing(0, CHUNKS) == []
    for chunk, table in zip(CHUNKS, before, strict=True):
        assert label_set.read(0, chunk, verify=True).equals(table)
        assert label_set.read(0, chunk, attempt=0).equals(table)
    fs, root = fsspec.core.url_to_fs(f"{label_set.uri}/view=0/s1/all.parquet")
    with fs.open(root) as handle:
        assert pq.ParquetFile(handle).num_row_groups == 3
    label_set.compact(0, "s1", 3)
    assert label_set.summary(0).num_chunks == 4


def test_an_incomplete_shard_is_not_compacted(local):
    label_set = make_set(local)
    label_set.write(0, CHUNKS[1], make_rows(0))
    with pytest.raises(LabelsMissing, match="2 of 3 chunks lack"):
        label_set.compact(0, "s1", 3)
    assert chunk_files(local) == ["chunk-00001.a0.parquet"]


def test_a_crash_between_the_two_steps_of_compaction_is_harmless(local, monkeypatch):
    label_set = make_set(local)
    fill(label_set)
    before = [label_set.read(0, chunk) for chunk in CHUNKS]

    def crash(uri):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "delete", crash)
        label_set.compact(0, "s1", 3)
    assert len(chunk_files(local)) == 5
    assert label_set.committed(0) == dict.fromkeys(CHUNKS, 0) and label_set.summary(0).num_chunks == 4
    assert all(label_set.read(0, chunk, verify=True).equals(table) for chunk, table in zip(CHUNKS, before, strict=True))
    with monkeypatch.context() as patch:
        patch.setattr(files, "put", crash)  # the second run has only to delete
        label_set.compact(0, "s1", 3)
    assert chunk_files(local) == ["all.parquet", "chunk-00000.a0.parquet"]


def test_a_later_attempt_beside_a_compacted_shard_wins(store):
    label_set = make_set(store)
    fill(label_set)
    label_set.compact(0, "s1", 3)
    label_set.write(0, CHUNKS[1], make_rows(8, rejected=()), attempt=1)
    assert label_set.committed(0)[CHUNKS[1]] == 1 and label_set.summary(0).num_rejected == 3
    assert label_set.read(0, CHUNKS[1], verify=True)["example_id"][0].as_py() == "e8-0"
    label_set.compact(0, "s1", 3)
    assert chunk_files(store) == ["all.parquet", "chunk-00000.a0.parquet"]
    assert label_set.committed(0)[CHUNKS[1]] == 1 and label_set.summary(0).num_rejected == 3
    assert label_set.read(0, CHUNKS[1], verify=True)["example_id"][0].as_py() == "e8-0"


def test_only_the_row_group_of_a_chunk_is_read_from_a_compacted_shard(local):
    label_set = make_set(local)
    fill(label_set)
    label_set.compact(0, "s1", 3)
    path = f"{label_set.uri}/view=0/s1/all.parquet"
    data = bytearray(files.read(path))
    data[8:60] = bytes(52)  # inside the first row group
    files.put(path, bytes(data))
    assert label_set.read(0, CHUNKS[2], verify=True).num_rows == 5
    with pytest.raises(StorageError, match="corrupt"):
        label_set.read(0, CHUNKS[0], verify=True)


def test_the_digest_does_not_depend_on_the_layout():
    rows, spec = make_rows(3), make_spec()
    table = chunkfile.to_table(rows, spec)
    digest = chunkfile.content_digest(table)
    padded = pa.concat_tables([chunkfile.to_table(make_rows(4), spec), table]).combine_chunks().slice(5)
    assert chunkfile.content_digest(padded) == digest
    assert chunkfile.content_digest(pa.concat_tables([table.slice(0, 2), table.slice(2)])) == digest
    whole = chunkfile.to_table(make_rows(3, rejected=()), spec)
    bitmap = [pa.Array.from_buffers(a.type, len(a), [pa.py_buffer(b"\xff"), *a.buffers()[1:]]) for a in [whole["embedding"].chunk(0)]]
    index = whole.column_names.index("embedding")
    assert chunkfile.content_digest(whole.set_column(index, whole.field("embedding"), bitmap[0])) == chunkfile.content_digest(whole)
    assert len({chunkfile.content_digest(t) for t in (table, whole, table.slice(0, 4), table.select(table.column_names[:-1]))}) == 4


def test_corrupt_bytes_are_detected(local):
    label_set = make_set(local)
    fill(label_set)
    path = f"{label_set.uri}/view=0/s1/chunk-00000.a0.parquet"
    good = files.read(path)
    rng = np.random.default_rng(0)
    for at in [*rng.choice(len(good) // 2, 12, replace=False).tolist(), len(good) - 6]:
        bad = bytearray(good)
        bad[at] ^= 0x55
        files.put(path, bytes(bad))
        try:
            table, expected = label_set.read(0, CHUNKS[0], verify=True), chunkfile.to_table(make_rows(0), make_spec())
            same = table.select(expected.column_names).columns == expected.columns
        except StorageError as error:
            assert "chunk-00000.a0.parquet" in str(error) and "delete it" in str(error) and "vkd verify" in str(error)
        else:
            assert same  # a byte of a page header that says nothing about the content
    for bad in (b"", good[:100], good[: len(good) // 2], b"PAR1" * 5):
        files.put(path, bad)
        with pytest.raises(StorageError, match="corrupt"):
            label_set.read(0, CHUNKS[0])
        with pytest.raises(StorageError, match="corrupt"):
            label_set.summary(0)


def test_another_chunks_file_is_not_taken_for_this_one(local):
    label_set = make_set(local)
    fill(label_set)
    folder = f"{label_set.uri}/view=0/s1"
    files.put(f"{folder}/chunk-00000.a0.parquet", files.read(f"{folder}/chunk-00001.a0.parquet"))
    with pytest.raises(StorageError, match="chunk-00000"):
        label_set.read(0, CHUNKS[0])


def test_verify_counts_lists_and_names(local):
    label_set = make_set(local)
    fill(label_set)
    planned = dict.fromkeys(CHUNKS, 5)
    good = verify_files(label_set, 0, planned)
    assert good.ok and (good.num_planned, good.num_labelled, good.num_rejected) == (20, 16, 4)
    files.put(f"{label_set.uri}/view=0/s1/chunk-00002.a0.parquet", b"nothing")
    bad = verify_files(label_set, 0, {**planned, CHUNKS[3]: 6, Chunk("s3", 0): 5})
    assert not bad.ok and bad.lacking == [Chunk("s3", 0)] and len(bad.corrupt) == 2
    assert "chunk-00002" in bad.corrupt[0] and "5 rows, the plan has 6" in bad.corrupt[1]


def test_newest_times_come_from_chunk_files(store):
    label_set = make_set(store)
    assert label_set.newest_times() == []
    fill(label_set)
    times = label_set.newest_times()
    assert len(times) == 4 and times == sorted(times) and times[0] > 1.7e9
    assert label_set.newest_times(2) == times[-2:]


def test_the_document_is_readable_and_enough(store):
    label_set = make_set(store)
    document = json.loads(files.read(f"{label_set.uri}/labelset.json"))
    assert document["fields"] == FIELDS and document["recorded"] == {"torch": "2.13"}
    for again in (LabelSet.at(label_set.uri), pickle.loads(pickle.dumps(label_set))):
        assert again.spec == label_set.spec == make_spec() and again.spec.name == label_set.uri.rsplit("/", 1)[-1]
        assert np.array_equal(again.probe["logits"], PROBE["logits"]) and again.fidelity == {"logits": {"kl_mean": 0.01}}
    with pytest.raises(LabelsMissing, match="no label set"):
        LabelSet.at(f"{store}/other")


def test_the_fingerprint_covers_all_but_the_alias():
    spec = make_spec()
    assert len(spec.fingerprint) == 12 and spec.name == f"teacher-{spec.fingerprint}"
    assert make_spec(alias="other").fingerprint == spec.fingerprint
    assert make_spec(dict(reversed(FIELDS.items()))).fingerprint == spec.fingerprint
    assert make_spec(encodings=ENCODINGS | {"regions": "fp16"}).fingerprint == spec.fingerprint
    others = [
        make_spec(FIELDS | {"precision": "bf16"}),
        make_spec(encodings=ENCODINGS | {"embedding": "fp16"}),
        make_spec(tensors=TENSORS | {"embedding": TensorType("float32", (7,))}),
    ]
    assert len({spec.fingerprint, *(other.fingerprint for other in others)}) == 4
    with pytest.raises(ConfigError, match="unknown label 'nothing'"):
        make_spec(encodings={"nothing": "fp16"})


def test_missing_labels_name_the_field_that_differs_in_the_nearest_set(store):
    ours = make_spec({**FIELDS, "data": {"views": {"seed": 1}, "size_px": 16}})
    with pytest.raises(LabelsMissing) as empty:
        LabelSet.open(store, ours)
    assert "vkd label RUN" in str(empty.value) and "differs" not in str(empty.value)
    LabelSet.create(store, make_spec({"teacher": {"name": "far"}}), PROBE, {}, {})
    LabelSet.create(store, make_spec(alias="teacher-b"), PROBE, {}, {})
    name = make_set(store).uri.rsplit("/", 1)[-1]
    with pytest.raises(LabelsMissing) as near:
        LabelSet.open(store, ours)
    assert f"the store has {name}, which differs in data.views.seed: 0 there, 1 here" in str(near.value)


def test_foreign_fields_are_refused_by_name(local):
    label_set = make_set(local)
    path = f"{label_set.uri}/labelset.json"
    document = json.loads(files.read(path))
    document["fields"]["teacher"]["version"] = 2
    files.put(path, json.dumps(document).encode())
    for opened in (lambda: LabelSet.open(local, make_spec()), lambda: make_set(local)):
        with pytest.raises(LabelsMismatch, match=r"teacher\.version: 2 there, 1 here"):
            opened()
    files.put(path, b"{")
    with pytest.raises(StorageError, match="not JSON"):
        LabelSet.open(local, make_spec())


def test_another_probe_is_refused(store):
    label_set = make_set(store)
    label_set.check_probe({"logits": PROBE["logits"] + 1e-3})
    for other in ({"logits": -PROBE["logits"]}, {"logits": PROBE["logits"][:, :5]}, {}, {"logits": np.full((1, 20), np.nan, np.float32)}):
        with pytest.raises(LabelsMismatch, match="probe"):
            label_set.check_probe(other)
        with pytest.raises(LabelsMismatch, match="probe"):
            LabelSet.create(store, make_spec(), other, {}, {})
    again = LabelSet.create(store, make_spec(), PROBE, {"torch": "9"}, {})
    assert again.recorded == {"torch": "2.13"}
