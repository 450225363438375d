"""What a store holds, from listings and footers: counts, rate and time left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import small

from vkd.errors import ConfigError
from vkd.run import Run
from vkd.status import SetStatus, note_planned, store_status
from vkd.store import chunkfile, files

NOW_S = 2e9


@pytest.fixture
def aged(labelled: Run, tmp_path: Path) -> Run:
    """A store whose five teacher chunks were committed 50, 40, ... 10 s ago, and its frames an hour ago."""
    run = small.copied(labelled, tmp_path)
    for i, path in enumerate(small.chunk_files(run, "teacher")):
        os.utime(path, (NOW_S, NOW_S - 50 + 10 * i))
    for path in small.chunk_files(run, "frames"):
        os.utime(path, (NOW_S, NOW_S - 3600))
    return run


def status_of(run: Run, alias: str) -> SetStatus:
    (found,) = (row for row in store_status(run.labels.store, NOW_S) if row.name.startswith(alias))
    return found


def test_counts_and_reasons(labelled: Run, spoiled: Run) -> None:
    for run, labelled_, rejected in ((labelled, 24, {}), (spoiled, 16, {"not_a_video": 8})):
        rows = store_status(run.labels.store, NOW_S)
        assert [row.name.rpartition("-")[0] for row in rows] == ["frames", "teacher"]
        assert [(row.view, row.labelled, row.rejected) for row in rows] == [(0, labelled_, rejected)] * 2


def test_the_rate_is_that_of_the_last_minutes(aged: Run) -> None:
    found = status_of(aged, "teacher")
    assert found.clips_per_s == pytest.approx(4 * 24 / 5 / 40)  # four chunks of 24 / 5 clips after the first one, in 40 s
    assert found.left_s is None
    assert found.cells()[4:] == ("?", "0.5", "-")


def test_time_left_needs_a_plan(aged: Run) -> None:
    uri = files.join(aged.labels.store, status_of(aged, "teacher").name)
    note_planned(uri, 24 + 48)
    found = status_of(aged, "teacher")
    assert found.planned == 72
    assert found.left_s == pytest.approx(48 / 0.48)
    assert found.cells() == (found.name, "0", "24", "0", "72", "0.5", "1.7 min")
    note_planned(uri, 10)
    assert status_of(aged, "teacher").left_s == 0


def test_an_idle_store_has_no_rate(aged: Run) -> None:
    found = status_of(aged, "frames")
    assert (found.clips_per_s, found.left_s) == (None, None)


def test_views_are_told_apart(unlabelled: Run, tmp_path: Path) -> None:
    run = small.changed(unlabelled, f"labels.store={tmp_path}", "data.views.count=2", "data.keep_frames=none")
    small.label(run)
    assert [(row.view, row.labelled) for row in store_status(str(tmp_path), NOW_S)] == [(0, 24), (1, 24)]


def test_only_listings_and_footers_are_read(labelled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunkfile, "read", None)
    assert len(store_status(labelled.labels.store, NOW_S)) == 2


def test_other_folders_are_passed_over(aged: Run) -> None:
    files.put(files.join(aged.labels.store, "notes", "text"), b"")
    assert len(store_status(aged.labels.store, NOW_S)) == 2


def test_no_store_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no label sets here -> vkd label RUN makes them"):
        store_status(str(tmp_path), NOW_S)
