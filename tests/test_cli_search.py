"""`vkd index` and `vkd search`: told wrong things, and from videos to the page of a search."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import fakes
import numpy as np
import paired
import pytest
import small
from video.clipmaker import make_clip

from vkd import planning
from vkd.clips import Sampling
from vkd.manifest import BuildOptions, build
from vkd.run import Run, dump, parse
from vkd.schema import DURATION_S, FRAMES, Columns, TensorType
from vkd.search import calibration
from vkd.search.page import NUM_THUMBNAILS

Main = Callable[..., tuple[int, str, str]]
NUM_VIDEOS = 5
NUM_PAIRS = 20  # to calibrate on: shapes are checked at every call
PARTS = ("coarse", "fine", "selector")


class Tiles(fakes.TinyTeacher):
    """Two frames a second, of each 3 x 3 unit vectors: maps of the colours of tiles, by numbers that lie in a file."""

    places = ("waves",)

    def __init__(self, waves: str) -> None:
        super().__init__()
        self.waves = waves
        self.sampling = Sampling(num_frames=8, size_px=24, mode="fps", fps=2.0)

    @property
    def needs(self) -> tuple[str, ...]:
        return FRAMES, DURATION_S

    @property
    def emits(self) -> Mapping[str, TensorType]:
        return {"regions": TensorType("float32", (None, 9, paired.NUM_DIMS))}

    def __call__(self, batch: Columns) -> Columns:
        tiles = batch[FRAMES].reshape(-1, 8, 3, 8, 3, 8, 3).astype(np.float32).mean((3, 5)).reshape(-1, 8, 9, 3)
        mapped = np.sin(tiles / 255 @ np.load(self.waves))
        regions = np.empty(len(mapped), object)
        for i, duration_s in enumerate(batch[DURATION_S].tolist()):
            regions[i] = (mapped[i] / np.linalg.norm(mapped[i], axis=2, keepdims=True))[: math.ceil(2 * float(duration_s or 4))]
        return batch | {"regions": regions}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of short videos with their regions and drawn networks for them. Read only."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "videos").mkdir()
    for number in range(NUM_VIDEOS):  # all are 2 s long and count at different speeds
        make_clip(folder / "videos" / f"v{number}.mp4", [i / (5 + 3 * number) for i in range((5 + 3 * number) * 2)], size_px=(64, 64))
    build(str(folder / "videos"), f"{folder}/manifest", BuildOptions(chunk_size=3))
    np.save(folder / "waves.npy", np.random.default_rng(0).normal(size=(3, paired.NUM_DIMS)).astype(np.float32) * 9)
    recipe = {"name": "label", "models": {"regions": {"name": "test_cli_search:Tiles", "waves": f"{folder}/waves.npy"}}}
    tree = small.tree_of(folder) | {"labels": {"store": f"{folder}/labels"}, "recipe": recipe}
    run = parse(tree | {"data": {"manifest": f"{folder}/manifest", "allow": ["/"]}})
    small.label(run)
    (folder / "run.yaml").write_text(dump(run))
    for part in PARTS:
        paired.exported(folder / part, part, features_of(run))
    return folder


def features_of(run: Run) -> str:
    return planning.label_specs(run, planning.build_teachers(run.recipe.teachers))["regions"].name


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NUM_PAIRS", NUM_PAIRS)


def words(folder: Path, out: Path, **parts: object) -> list[object]:
    """Of `vkd index`; `parts` are other folders of networks."""
    named = {part: folder / part for part in PARTS} | parts
    return ["index", folder / "run.yaml", out, *(word for part, place in named.items() for word in (f"--{part}", place))]


def test_videos_are_indexed_found_and_shown(main: Main, indexed: Path, tmp_path: Path) -> None:
    code, out, err = main(*words(indexed, tmp_path / "index"), "--json")
    assert code == 0, err
    assert json.loads(out)["videos"] == NUM_VIDEOS and f"next: vkd search {tmp_path}/index QUERY.mp4" in err
    copy = shutil.copy(indexed / "videos" / "v3.mp4", tmp_path / "query.mp4")
    code, out, err = main("search", tmp_path / "index", copy, "--top", 3, "--json")
    assert code == 0, err
    first, *others = json.loads(out)["hits"]
    assert first["uri"].endswith("v3.mp4") and first["score"] == pytest.approx(1, abs=1e-4) and not first["is_fine"]
    assert len(others) == 2 and all(hit["score"] < first["score"] - 1e-4 for hit in others)
    code, out, _ = main("search", tmp_path / "index", copy)
    assert code == 0 and out.count(".mp4") == NUM_VIDEOS and "no match: these are only" in out
    code, out, err = main(
        "search", tmp_path / "index", copy, "--budget", "100%", "--match-from", 0, "--page", tmp_path / "page.html", "--json"
    )
    assert code == 0 and f"page: {tmp_path}/page.html" in err and "no match" not in err
    parts = [hit["segment"] for hit in json.loads(out)["hits"] if hit["segment"]]
    assert parts and all(0 <= part["start_s"] < part["end_s"] <= 2 and part["query_start_s"] < part["query_end_s"] for part in parts)
    page = (tmp_path / "page.html").read_text()
    assert f"{NUM_VIDEOS} of {NUM_VIDEOS} match" in page and page.count("<img") == 2 * NUM_THUMBNAILS * len(parts)


@pytest.mark.parametrize("out", ["{}/index", "memory://kept/index"])
def test_an_index_needs_no_file_outside(main: Main, indexed: Path, tmp_path: Path, out: str) -> None:
    index = out.format(tmp_path)
    code, _, err = main(*words(indexed, index))
    assert code == 0, err
    assert main(*words(indexed, index))[0] == 0, "the same index again"
    copy = shutil.copy(indexed / "videos" / "v3.mp4", tmp_path / "query.mp4")
    if "://" not in index:
        index = shutil.move(index, tmp_path / "moved")
    (indexed / "waves.npy").rename(tmp_path / "waves.npy")
    try:
        code, found, err = main("search", index, copy, "--json")
    finally:
        (tmp_path / "waves.npy").rename(indexed / "waves.npy")
    assert code == 0, err
    assert json.loads(found)["hits"][0]["uri"].endswith("v3.mp4")


def test_networks_that_do_not_fit_are_told_in_one_line(main: Main, indexed: Path, tmp_path: Path) -> None:
    frames = small.exported_student(tmp_path / "frames")
    other = paired.exported(tmp_path / "other", "fine", "regions-0")
    for parts, told in (
        ({"fine": tmp_path / "none"}, f"{tmp_path}/none: holds no exported student"),
        ({"fine": frames}, f"{frames}: 'shift_cnn' was trained on no region features"),
        ({"fine": other}, f"{other}: was trained on regions-0, the coarse student on regions-"),
        ({"fine": indexed / "coarse"}, "holds a CoarseStudent, not a FineStudent -> name the student/ folder"),
        ({"selector": indexed / "fine"}, "holds a FineStudent, not a Selector"),
    ):
        code, _, err = main(*words(indexed, tmp_path / "index", **parts))
        assert code in (2, 4) and err.count("\n") == 1 and told in err, err
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("labels.store=/nowhere", "no labels regions-"),
        ("recipe.models.regions=fakes:TinyTeacher", "recipe.regions: it emits no 'regions', but logits, embedding"),
        ("recipe.models.regions=fakes:TinyRegions", "no labels regions-"),
    ],
)
def test_a_run_without_regions_is_told(main: Main, indexed: Path, tmp_path: Path, override: str, told: str) -> None:
    code, _, err = main(*words(indexed, tmp_path / "index"), override)
    assert code == 2 and told in err and err.count("\n") == 1, err


def test_a_run_whose_labels_lack_is_told(main: Main, indexed: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(indexed / "labels", tmp_path / "labels")
    next(copied.glob("*/view=0/*/chunk-*")).unlink()
    code, _, err = main(*words(indexed, tmp_path / "index"), f"labels.store={copied}")
    assert code == 2 and "regions of 1 of 2 chunks are missing -> vkd label " in err


def test_a_folder_without_an_index_is_told(main: Main, tmp_path: Path) -> None:
    code, _, err = main("search", tmp_path, "q.mp4")
    assert code == 2 and f"vkd: {tmp_path}: no index here -> vkd index RUN {tmp_path}" in err


def test_a_query_that_is_no_video_is_told(main: Main, indexed: Path, tmp_path: Path) -> None:
    assert main(*words(indexed, tmp_path / "index"))[0] == 0
    (tmp_path / "q.mp4").write_text("no video\n")
    for name in ("q.mp4", "none.mp4"):
        code, _, err = main("search", tmp_path / "index", tmp_path / name)
        assert code and err.startswith("vkd: ") and err.count("\n") == 1 and name in err


def test_a_query_of_which_only_the_beginning_is_searched_for_is_told(main: Main, indexed: Path, tmp_path: Path) -> None:
    assert main(*words(indexed, tmp_path / "index"))[0] == 0
    make_clip(tmp_path / "long.mp4", [i / 5 for i in range(40)], size_px=(64, 64))  # 8 s, of which the teacher sees 4
    code, out, _ = main("search", tmp_path / "index", tmp_path / "long.mp4", "--budget", "0%")
    assert code == 0 and "the query goes on: only its first 4.0 s were searched for" in out
    assert f"{NUM_VIDEOS} videos, 0 compared finely" in out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--budget", "200%"), "--budget '200%' is no share"),
        (("--order", "fine"), "--order 'fine' is no order -> choose selector or coarse"),
    ],
)
def test_options_that_are_wrong_are_told(main: Main, tmp_path: Path, options: tuple[str, ...], told: str) -> None:
    code, _, err = main("search", tmp_path, "q.mp4", *options)
    assert code == 2 and told in err


def test_an_index_is_measured_by_its_ground_truth(main: Main, indexed: Path, tmp_path: Path) -> None:
    assert main(*words(indexed, tmp_path / "index"))[0] == 0
    (tmp_path / "truth.json").write_text(json.dumps({"v0": ["v1", "v2"], "v3": ["v4"], "gone": ["v0"]}))
    code, out, err = main("retrieval", tmp_path / "index", tmp_path / "truth.json", "--budgets", "100%, 0, 40%", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["budgets"], told["queries"], told["missing"], told["videos"]) == ([0, 0.4, 1], 2, 1, NUM_VIDEOS)
    assert "2 queries among 5 videos; 1 more are not in the index" in err
    assert "mAP: 99% of what all fine scores give takes vkd search --order " in err
    for options, said in (
        (("--budgets", "5%"), "--budgets lacks 100%"),
        (("--protocol", "evve"), "truth.json: it is no ground truth of evve"),
        (("--protocol", "vcdb"), "'vcdb' is no protocol"),
    ):
        code, _, err = main("retrieval", tmp_path / "index", tmp_path / "truth.json", *options)
        assert code == 2 and said in err and err.count("\n") == 1, err
