"""Which videos of a run are indexed."""

from __future__ import annotations

from pathlib import Path

import paired
import pyarrow as pa
import pytest

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
