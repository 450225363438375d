"""One local Ray for all tests of this folder that run in this process, and the real clips that they work on."""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import Mock

import av
import harness
import pytest

from vkd.run import Run

if TYPE_CHECKING:
    from vkd.label_report import LabelReport

TINY, WIDE = "carphone_pristine.mp4", "bikes.mp4"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray's own code warns of what Ray deprecates; that is nothing of ours."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs that ends with the test session."""
    import ray

    from vkd import cluster

    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # workers import the fakes of tests/
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    cluster.quieten()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def videos(clips_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two whole videos of 4 and 10 s; `half.mp4`, cut in its middle; and `text.mp4`, which is no video."""
    folder = tmp_path_factory.mktemp("videos")
    for name in (TINY, WIDE):
        shutil.copy(clips_dir / name, folder / name)
    cut_in_the_middle(folder / TINY, folder / "half.mp4")
    (folder / "text.mp4").write_text("not a video\n")
    return folder


@pytest.fixture(scope="session")
def tiny_video(clips_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one video of 4 s."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copy(clips_dir / TINY, folder / TINY)
    return folder


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> harness.Tree:
    return harness.small_run(tmp_path_factory.mktemp("small"), videos)


@pytest.fixture(scope="session")
def run(tree: harness.Tree) -> Run:
    return harness.parsed(tree)


@pytest.fixture(scope="session")
def report(run: Run, local_ray: None) -> LabelReport:
    """What Ray said of labelling `run`."""
    from vkd import pipeline

    return pipeline.label(run, Mock())


def cut_in_the_middle(source: Path, target: Path) -> None:
    """The packets of `source` in an mp4 that opens, its header being first, and ends too early."""
    with av.open(str(source)) as whole, av.open(str(target), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    data = target.read_bytes()
    target.write_bytes(data[: len(data) * 6 // 10])
