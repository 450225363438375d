"""Mining pairs: against brute force, and what must hold of any pools."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paired
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd import pairs, schema
from vkd.clips import ClipPlan, SplitPlan
from vkd.errors import ConfigError, LabelsMissing, ManifestError
from vkd.manifest import Manifest
from vkd.pairs import Candidates, Video, candidates, mine
from vkd.planning import Plan
from vkd.rounds import Chunk
from vkd.run import Run, dump, parse
from vkd.steps import Pairs

Main = Callable[..., tuple[int, str, str]]


def rows_of(num_videos: int) -> list[dict[str, str | None]]:
    """Videos of 12 sources in 6 families; every fifth source is held out with its family's other."""
    rows: list[dict[str, str | None]] = []
    for i in range(num_videos):
        source = i % 12
        split = "val" if source // 2 in (1, 4) else "train"
        rows.append({"video_id": f"v{i:03d}", "source": f"s{source}", "family": f"f{source // 2}", "split": split})
    return rows


def mined(run: Run, asked: Pairs) -> tuple[pairs.PairsReport, list[dict[str, Any]]]:
    report = mine(run, asked)
    manifest = Manifest.load(asked.out)
    return report, [row for shard in manifest.shards for row in manifest.read_shard(shard).to_pylist()]


def pools_of(row: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"same": [], "near": [], "random": []}
    for other, pool in zip(row["others"].split(), row["pools"].split(), strict=True):
        found[pool].append(other)
    return found


def videos() -> dict[str, Any]:
    """60, of which two were rejected and one has no frame."""
    gone = {"v007": None, "v030": None, "v011": np.zeros((0, paired.NUM_REGIONS, paired.NUM_DIMS), np.float32)}
    return paired.random_videos(60) | gone


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """These videos in three shards, with their features."""
    rows = rows_of(60)
    made = paired.run_of(tmp_path, [paired.table_of(rows[:20]), paired.table_of(rows[20:41]), paired.table_of(rows[41:])])
    paired.store(made, videos())
    return made


def names_of(run: Run) -> dict[str, str]:
    """`<shard>/<row>` -> video_id, as the manifest says."""
    manifest = Manifest.load(run.data.manifest)
    return {
        f"{shard}/{row}": video_id
        for shard in manifest.shards
        for row, video_id in enumerate(manifest.read_shard(shard)["video_id"].to_pylist())
    }


def test_pools_are_those_of_brute_force(run: Run, tmp_path: Path) -> None:
    report, found = mined(run, Pairs(out=f"{tmp_path}/pairs", num_neighbours=5, num_random=4))
    names, about = names_of(run), {str(row["video_id"]): row for row in rows_of(60)}
    x = {v: regions.mean(axis=(0, 1)) for v, regions in videos().items() if regions is not None and len(regions)}
    assert (report.videos, report.left_out, report.anchors) == (57, 3, 57)
    assert {names[row["anchor"]] for row in found} == set(x)
    for row in found:
        anchor, pools = names[row["anchor"]], {pool: [names[o] for o in others] for pool, others in pools_of(row).items()}
        mine = about[anchor]
        ours = [v for v in x if v != anchor and about[v]["split"] == mine["split"]]
        assert set(pools["same"]) == {v for v in ours if about[v]["source"] == mine["source"]}
        strangers = [v for v in ours if about[v]["family"] != mine["family"]]
        cosine = {v: x[anchor] @ x[v] / np.linalg.norm(x[anchor]) / np.linalg.norm(x[v]) for v in strangers}
        assert pools["near"] == sorted(strangers, key=lambda v: -cosine[v])[:5]
        assert len(set(pools["random"])) == 4
        assert set(pools["random"]) <= set(strangers) - set(pools["near"])
        assert (row["split"], row["source"], row["features"]) == (mine["split"], mine["source"], report.features)
        assert row["video_id"] == schema.digest(anchor, report.features, row["others"])
        assert row["duration_s"] is None
    assert report.candidates == {p: sum(len(pools_of(row)[p]) for row in found) for p in ("same", "near", "random")}


def test_the_manifest_is_one_that_a_run_can_plan(run: Run, tmp_path: Path) -> None:
    mine(run, Pairs(out=f"{tmp_path}/pairs", chunk_size=10))
    plan = Plan(f"{tmp_path}/pairs", ClipPlan(), SplitPlan(by="column"))
    assert (plan.num_examples, plan.chunk_size, len(plan.chunks)) == (57, 10, 6)
    examples = plan.examples(plan.chunks[0])
    assert schema.URI not in examples.column_names
    assert {"example_id", "anchor", "others", "pools", "features"} <= set(examples.column_names)
    assert sum(map(len, plan.rows("val"))) == 20
    assert {row["split"] for row in examples.to_pylist()} == {"train"}
    assert Manifest.load(f"{tmp_path}/pairs").index.sources[1] == f"manifest {Manifest.load(run.data.manifest).digest}"


def test_the_order_of_shards_changes_nothing(run: Run, tmp_path: Path) -> None:
    manifest = Manifest.load(run.data.manifest)
    tables = [manifest.read_shard(shard) for shard in reversed(manifest.shards)]
    other = paired.run_of(tmp_path / "other", tables)
    paired.store(other, videos())
    first, second = (mined(each, Pairs(out=f"{each.output}/pairs", num_neighbours=7, num_random=3))[1] for each in (run, other))
    assert first == second


def test_doing_it_again_changes_nothing_and_other_pairs_are_refused(run: Run, tmp_path: Path) -> None:
    asked = Pairs(out=f"{tmp_path}/pairs", num_neighbours=3)
    report = mine(run, asked)
    before = {path: path.stat().st_mtime_ns for path in Path(asked.out).rglob("*.*")}
    assert mine(run, asked) == report
    for change in ({"seed": 1}, {"num_neighbours": 2}, {"chunk_size": 8}):
        with pytest.raises(ManifestError, match="name another OUT"):
            mine(run, asked.model_copy(update=change))
    with pytest.raises(ManifestError, match="must not mix"):
        mine(run, asked.model_copy(update={"out": run.data.manifest}))
    assert {path: path.stat().st_mtime_ns for path in Path(asked.out).rglob("*.*")} == before


def test_other_features_of_the_same_name_are_refused(run: Run, tmp_path: Path) -> None:
    """Such as when a rejected video was labelled after all."""
    asked = Pairs(out=f"{tmp_path}/pairs")
    mine(run, asked)
    chunk = Chunk(Manifest.load(run.data.manifest).shards[0], 2)
    label_set = pairs._regions(run)
    label_set.forget(0, chunk, [Plan.of(run).examples(chunk)["example_id"][0].as_py()])
    with pytest.raises(ManifestError, match="must not mix"):
        mine(run, asked)


def test_a_run_that_splits_by_itself_says_so(run: Run, tmp_path: Path) -> None:
    by_source = run.model_copy(update={"data": run.data.model_copy(update={"split": SplitPlan(by="group", group="source", holdout=0.5)})})
    _, found = mined(by_source, Pairs(out=f"{tmp_path}/pairs"))
    split = {row["anchor"]: row["split"] for row in found}
    assert set(split.values()) == {"train", "val"}
    assert all(split[other] == row["split"] for row in found for other in row["others"].split())


def test_columns_that_are_not_there_are_not_needed(tmp_path: Path) -> None:
    """Nor do two rows of one video make it its own neighbour."""
    run = paired.run_of(tmp_path, [paired.table_of([{"video_id": f"v{i // 2:03d}"} for i in range(8)])])
    paired.store(run, paired.random_videos(4))
    report, found = mined(run, Pairs(out=f"{tmp_path}/pairs", num_neighbours=2))
    assert (report.videos, report.left_out, report.candidates) == (4, 4, {"same": 0, "near": 8, "random": 4})
    assert set(found[0]) == {"video_id", "duration_s", "anchor", "others", "pools", "features", "num_frames"}
    names = names_of(run)
    assert all(len({names[name] for name in (row["anchor"], *row["others"].split())}) == 4 for row in found)


groups = st.lists(st.integers(0, 4), min_size=1, max_size=24)


@given(groups, st.integers(0, 5), st.integers(0, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_pools(sources: list[int], num_neighbours: int, num_random: int, seed: int) -> None:
    """Few directions, so that there are ties; source 0 is no source, sources 3 and 4 are a family."""
    rng = np.random.default_rng(seed)
    ids = sorted(f"{i:04x}" for i in rng.choice(1 << 16, len(sources), replace=False))
    videos = [Video("train", x, f"s/{x}", x, f"s{s}" if s else "", "f" if s > 2 else "") for x, s in zip(ids, sources, strict=True)]
    x = rng.integers(-1, 2, (len(sources), 2)).astype(np.float32)
    asked = Pairs(out="/o", num_neighbours=num_neighbours, num_random=num_random, seed=seed)
    found = list(candidates(videos, x, asked))
    for i, pools in enumerate(found):
        same, near, random = ([int(j) for j in pool] for pool in pools)
        assert same == [j for j in range(len(videos)) if j != i and sources[j] == sources[i] and sources[i]]
        strangers = [j for j in range(len(videos)) if j not in (i, *same) and not (sources[i] > 2 and sources[j] > 2)]
        assert near == sorted(strangers, key=lambda j: (-(x[i] @ x[j]), ids[j]))[:num_neighbours]
        assert len(set(random)) == len(random) == min(num_random, len(strangers) - len(near))
        assert set(random) <= set(strangers) - set(near)
    assert told(found) == told(list(candidates(videos, x, asked, block_bytes=1))) == told(list(candidates(videos, x, asked)))


def told(found: Sequence[Candidates]) -> list[list[list[int]]]:
    return [[pool.tolist() for pool in each] for each in found]


def test_random_candidates_depend_on_the_anchor_and_the_seed() -> None:
    videos, x = [Video("train", f"{i:03d}", "", "", "", "") for i in range(200)], np.zeros((200, 1), np.float32)
    first, other = (list(candidates(videos, x, Pairs(out="/o", num_neighbours=0, num_random=9, seed=seed))) for seed in (0, 1))
    assert len({tuple(each.random.tolist()) for each in (*first, *other)}) == 400


def test_the_verb(run: Run, tmp_path: Path, main: Main) -> None:
    (tmp_path / "run.yaml").write_text(dump(run))
    code, out, err = main("pairs", tmp_path / "run.yaml", tmp_path / "pairs", "pairs.num_neighbours=2", "--json")
    report = json.loads(out)
    assert code == 0, err
    assert (report["path"], report["videos"], report["candidates"]["near"]) == (f"{tmp_path}/pairs", 57, 114)
    assert "videos left out" in err
    code, _, err = main("pairs", tmp_path / "run.yaml", tmp_path / "pairs", "pairs.num_neighbors=2")
    assert code == 2 and "did you mean 'num_neighbours'" in err
    code, _, err = main("pairs", tmp_path / "run.yaml", tmp_path / "pairs")
    assert code == 2 and "name another OUT" in err


def test_a_section_of_the_run_file_comes_back(run: Run) -> None:
    asked = Pairs(out="/pairs", num_random=7)
    assert parse(run.model_dump(mode="json") | {"pairs": asked.model_dump()}).pairs == asked


def test_what_cannot_be_mined(run: Run, tmp_path: Path) -> None:
    asked = Pairs(out=f"{tmp_path}/pairs")
    with pytest.raises(ConfigError, match="no 'regions' of frames, regions and dimensions, but logits, embedding"):
        mine(parse(run.model_dump(mode="json"), ["recipe.teacher=fakes:TinyTeacher"]), asked)
    with pytest.raises(ConfigError, match="the recipe has no teacher"):
        mine(parse(run.model_dump(mode="json"), ["recipe={name: dns, student: {name: visil}}"]), asked)
    with pytest.raises(LabelsMissing, match="no labels"):
        mine(parse(run.model_dump(mode="json"), [f"labels.store={tmp_path}/none"]), asked)
    lonely = paired.run_of(tmp_path / "lonely", [paired.table_of([{"video_id": "v000"}])])
    paired.store(lonely, paired.random_videos(1))
    with pytest.raises(ConfigError, match="no video has another one"):
        mine(lonely, asked)
    next(Path(run.store).glob("*/view=0/*/chunk-00001.a0.parquet")).unlink()
    with pytest.raises(LabelsMissing, match="labels of 1 of 21 chunks"):
        mine(run, asked)
    assert not Path(asked.out).exists()
    partial = parse(run.model_dump(mode="json"), ["labels.allow_partial=true"])
    assert mine(partial, asked).left_out > 3


def test_a_video_is_no_negative_of_what_else_it_shows() -> None:
    """v0 is pasted into another video of s1: nobody can say how alike they are."""
    hosts = {"v0": "s1"}
    videos = [Video("train", f"v{i}", f"s/{i}", f"v{i}", f"s{i // 2}", f"s{i // 2}", hosts.get(f"v{i}", "")) for i in range(8)]
    found = list(candidates(videos, np.eye(8, dtype=np.float32), Pairs(out="x", num_neighbours=0, num_random=9)))
    assert {i: set(each.random.tolist()) for i, each in enumerate(found)} == {
        0: {4, 5, 6, 7},
        1: {2, 3, 4, 5, 6, 7},
        2: {1, 4, 5, 6, 7},
        3: {1, 4, 5, 6, 7},
        **{i: {0, 1, 2, 3, 6, 7} for i in (4, 5)},
        **{i: {0, 1, 2, 3, 4, 5} for i in (6, 7)},
    }
