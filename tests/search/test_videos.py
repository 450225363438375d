"""Which videos of a run are indexed."""

from __future__ import annotations

from pathlib import Path

import paired
import pyarrow as pa
import pytest

from vkd.clips import Sampling
from vkd.errors import ConfigError
from vkd.search import videos


def test_clips_of_videos_are_refused(tmp_path: Path) -> None:
    """Moments: the second begins within its video. Only one of a video's clips could be found."""
    moments = {"start_s": pa.array([0.0, 1.0]), "end_s": pa.array([1.0, 2.0])}
    table = paired.table_of([{"video_id": "v000", "uri": "v0.mp4"}, {"video_id": "v000", "uri": "v0.mp4"}])
    run = paired.run_of(tmp_path, [pa.table({name: table[name] for name in table.column_names} | moments)])
    paired.store(run, paired.random_videos(1))
    with pytest.raises(ConfigError, match=r"v0\.mp4 is cut into clips.*plan=whole"):
        videos.of_run(run)


def test_a_family_is_akin_but_known_to_show_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired.Regions, "sampling", Sampling(num_frames=6, size_px=8, mode="fps", fps=2.0))
    rows = [
        {"video_id": "v000", "uri": "v0.mp4", "source": "a", "family": "a", "host": "b"},
        {"video_id": "v001", "uri": "v1.mp4", "source": "v1", "family": "folder"},
    ]
    table = paired.table_of(rows).drop_columns(["duration_s"]).append_column("duration_s", pa.array([1.2, 60.0]))
    run = paired.run_of(tmp_path, [table])
    paired.store(run, paired.random_videos(2))
    first, second = videos.of_run(run)[0]
    assert (first.shown, first.akin, first.num_frames) == (["a", "b"], ["a", "b"], 3)
    assert (second.shown, second.akin, second.num_frames) == (["v1"], ["folder", "v1"], 6)
