"""Distill-and-Select on stored region features: what is drawn, what is learned, and that a chain of runs goes through."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paired
import pytest
import small
import torch
import yaml
from torch import Tensor

from vkd import checkpoint, claim, evaluation, pairs, planning, takedown, training, trial, verification
from vkd.batches import Part
from vkd.errors import ConfigError, LabelsMismatch
from vkd.feeding import Feeder, open_sets
from vkd.models import ModelSpec, find
from vkd.planning import Plan
from vkd.recipes import RECIPES
from vkd.recipes.base import Batch
from vkd.recipes.dns import DnS
from vkd.recipes.dns.batches import MASK, REGIONS
from vkd.recipes.dns.distiller import SelectorDistiller, SimilarityDistiller, TripletDistiller, repeated
from vkd.run import Run, dump, parse
from vkd.schema import WEIGHT
from vkd.steps import Pairs
from vkd.store.labelset import ChunkRows, LabelSet
from vkd.students.visil import VisilHead
from vkd.verification import list_rejects

Main = Callable[..., tuple[int, str, str]]
NUM_SOURCES, COPIES = 6, 3
SMALL = {"num_dims": paired.NUM_DIMS, "size": "small"}
FINE = {"name": "fine", **SMALL}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of sources with noisy copies, and their pair manifest. Read only."""
    folder = tmp_path_factory.mktemp("dns")
    rng, videos, rows = np.random.default_rng(0), {}, []
    for source in range(NUM_SOURCES):
        original = rng.normal(size=(10 + source, paired.NUM_REGIONS, paired.NUM_DIMS))
        for copy in range(COPIES):
            name = f"v{source}{copy}"
            x = original + 0.3 * rng.normal(size=original.shape)
            videos[name] = (x / np.linalg.norm(x, axis=2, keepdims=True)).astype(np.float16).astype(np.float32)
            rows.append({"video_id": name, "source": f"s{source}", "split": "val" if source >= 4 else "train"})
    run = paired.run_of(folder, [paired.table_of(rows)], "data.split.by=column")
    paired.store(run, videos)
    pairs.mine(run, Pairs(out=f"{folder}/pairs", num_neighbours=2, num_random=2, chunk_size=4))
    return folder


def run_of(folder: Path, name: str, student: Mapping[str, Any], **recipe: Any) -> Run:
    tree = small.tree_of(folder) | {"labels": {"mode": "stored", "store": f"{folder}/labels"}, "output": f"{folder}/{name}"}
    tree["name"], tree["data"] = name, {"manifest": f"{folder}/pairs", "split": {"by": "column"}}
    tree["recipe"] = {"name": "dns", "student": dict(student), **recipe}
    tree["train"] = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.0}
    return parse(tree)


def scores_of(folder: Path, path: str | None = None, **options: Any) -> dict[str, Any]:
    return {"name": "pair_scores", "store": f"{folder}/labels", "path": path, **options}


def label(run: Run) -> float:
    """Write what the run's teachers say, as labelling does; the median score."""
    plan, teachers, said = Plan.of(run), planning.build_teachers(run.recipe.teachers), list[np.ndarray]()
    for alias, teacher in teachers.items():
        teacher.load("cpu")
        label_set = LabelSet.create(
            run.store, planning.label_specs(run, teachers)[alias], {"scores": teacher(teacher.probe_batch())["scores"]}, {}, {}
        )
        for chunk in plan.chunks:
            examples = plan.examples(chunk)
            scores = teacher(planning.text_columns(examples, planning.columns_for([teacher])))["scores"]
            label_set.write(0, chunk, ChunkRows(examples["example_id"].to_pylist(), {}, {"scores": list(scores)}))
            said += scores
    return float(np.median(np.concatenate(said)))


def feeder_of(run: Run, split: str = "train", rank: int = 0, world_size: int = 1) -> Feeder:
    plan, sets = open_sets(run, Plan.of(run))
    return Feeder(run, plan, sets, split, rank, world_size)


def batches_of(feeder: Feeder, epoch: int = 0) -> list[Batch]:
    return [fed.batch for fed in feeder.stream(feeder.one_pass(epoch), 4, seed=0)]


@pytest.fixture(scope="module")
def scored(folder: Path) -> Run:
    """A run whose teacher, region Chamfer without weights, has scored all pairs. Read only."""
    run = run_of(folder, "scored", FINE, teacher=scores_of(folder, kind="chamfer"), min_positive=0.5)
    label(run)
    return run


def test_visil_learns_scores_from_repeated_videos_too(scored: Run) -> None:
    """It pads its map by the border: padded videos would be scored otherwise than whole ones."""
    (batch, *_) = batches_of(feeder_of(scored))
    torch.manual_seed(0)
    visil = VisilHead(paired.NUM_DIMS, size="small")
    distiller = scored.recipe._kind.distiller(visil, scored.recipe)  # type: ignore[attr-defined]
    query, target = (repeated(batch[REGIONS][:, i], batch[MASK][:, i]) for i in (0, 1))
    expected = visil.compare_pairs(visil.index(query), visil.index(target)).similarity
    torch.testing.assert_close(distiller.said_of_pairs(batch).similarity[: len(expected)], expected)


def test_it_is_found_by_name() -> None:
    assert find(ModelSpec(name="dns"), RECIPES, "recipe") is DnS


def test_an_anchor_and_two_candidates(scored: Run) -> None:
    batches = batches_of(feeder_of(scored))
    assert sum(len(batch[WEIGHT]) for batch in batches) == 4 * COPIES
    for batch in batches:
        n, three, t, r, d = batch[REGIONS].shape
        assert (three, r, d) == (3, paired.NUM_REGIONS, paired.NUM_DIMS) and t % 4 == 0
        assert batch[MASK].shape == (n, 3, t) and batch[MASK].any(2).all()
        assert not batch[REGIONS][~batch[MASK]].any()
        assert (batch["teacher.scores"][:, 0] >= 0.5).all() and (batch["teacher.scores"][:, 1] < 0.5).all()


def test_candidates_are_drawn_anew_each_epoch_and_do_not_depend_on_ranks(scored: Run) -> None:
    def drawn(epoch: int, world_size: int = 1) -> dict[int, list[float]]:
        feeders = [feeder_of(scored, "train", rank, world_size) for rank in range(world_size)]
        rows = [(batch["example"], batch["teacher.scores"], batch[WEIGHT]) for f in feeders for batch in batches_of(f, epoch)]
        return {n: s for ns, scores, ws in rows for n, s, w in zip(ns.tolist(), scores.tolist(), ws.tolist(), strict=True) if w}

    assert drawn(0) == drawn(0, 3) and len(drawn(0)) == 4 * COPIES
    assert drawn(0) != drawn(1)


@pytest.mark.parametrize(("split", "alike"), [("train", False), ("val", True)])
def test_only_what_is_learned_from_is_disturbed(folder: Path, split: str, alike: bool) -> None:
    disturbed, plain = (
        [batch[REGIONS] for batch in batches_of(feeder_of(run_of(folder, "copies", FINE, augment=a), split))] for a in (True, False)
    )
    assert plain and alike == all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(disturbed, plain, strict=True))


def test_without_a_teacher_copies_are_positive(folder: Path) -> None:
    feeder = feeder_of(run_of(folder, "copies", FINE, augment=False))
    for batch in batches_of(feeder):
        means = [
            torch.stack([x[m].mean(dim=0).flatten() for x, m in zip(batch[REGIONS][:, i], batch[MASK][:, i], strict=True)])
            for i in range(3)
        ]
        near, far = ((means[0] * means[i]).sum(1) for i in (1, 2))
        assert (near > far).all()


def test_a_training_that_learns_from_no_anchor_is_no_training(folder: Path) -> None:
    """No score reaches the threshold, so no anchor has a positive candidate."""
    run = run_of(folder, "unreachable", FINE, teacher=scores_of(folder, kind="chamfer"), min_positive=1.0)
    label(run)
    with pytest.raises(ConfigError, match="none of 12 examples had anything to learn from"):
        training.train(run, lambda _: None)
    assert not Path(training.student_folder(run)).exists()
    student = paired.exported(folder / "any", "vkd.students.visil:FineStudent", "regions-0")
    found = evaluation.evaluate(run, student)
    assert found["num_clips"] == 0 and found["fidelity"] == {}  # and not an accuracy of 0


class Stored(trial.SamplePlan):
    """All of a plan, under the names of its own chunks: its scores are in the store already."""

    examples = Plan.examples

    def __init__(self, plan: Plan) -> None:
        self.__dict__ |= plan.__dict__ | {"_classes": plan.classes()}


def test_a_trial_finds_the_features_that_its_own_store_lacks(scored: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial labels into a store of its own: pairs get scores there, and videos no features."""
    run = small.changed(scored, f"labels.store={tmp_path}/labels", f"output={tmp_path}/out")
    label(run)
    for name in ("STEPS", "WARM_UP_STEPS"):
        monkeypatch.setattr(trial, name, 2)
    busy_s, _ = trial._train(run, Stored(Plan.of(run)), scored.labels.store)
    assert busy_s > 0


def test_a_rank_without_rows_gets_a_masked_anchor(scored: Run) -> None:
    feeder = feeder_of(scored)
    empty: list[Part] = []
    batch = feeder.batches(empty, 0)
    assert batch[REGIONS].shape == (1, 3, 4, paired.NUM_REGIONS, paired.NUM_DIMS) and not batch[WEIGHT].any()
    for options in ({}, {"name": "coarse"}):
        distiller = DnS.model_validate(scored.recipe.model_dump() | {"student": FINE | options}).distiller({}, 0)
        for total, count in distiller(batch).values():
            assert total == 0 and count == 0 and total.requires_grad


def test_two_sets_of_features_do_not_mix(scored: Run) -> None:
    feeder = feeder_of(scored)
    chunk = feeder._load(0, 0)
    other = chunk.examples.set_column(chunk.examples.column_names.index("features"), "features", [["regions-0"] * chunk.examples.num_rows])
    part = (type(chunk)(chunk.tables, chunk.usable, chunk.classes, chunk.numbers, other), np.arange(2))
    with pytest.raises(LabelsMismatch, match="regions-0"):
        feeder.batches([part], 0)


@pytest.mark.parametrize(
    ("student", "teachers", "kind"),
    [
        ({"name": "visil"}, [], TripletDistiller),
        (FINE, ["teacher"], SimilarityDistiller),
        ({"name": "selector"}, ["teacher", "coarse"], SelectorDistiller),
    ],
)
def test_what_is_trained_follows_from_student_and_teachers(student: dict[str, Any], teachers: list[str], kind: type) -> None:
    recipe = DnS.model_validate(
        {"name": "dns", "student": {**SMALL, **student}} | dict.fromkeys(teachers, scores_of(Path("x"), kind="mean"))
    )
    assert type(recipe.distiller({}, 0)) is kind
    wrong = "selector" if student["name"] != "selector" else "fine"
    with pytest.raises(ConfigError, match="trains a"):
        DnS.model_validate(recipe.model_dump() | {"student": {**SMALL, "name": wrong}}).distiller({}, 0)


def test_teachers_on_the_scale_of_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    students = {"fine": "vkd.students.visil:FineStudent", "coarse": "vkd.students.coarse:CoarseStudent"}
    fine, coarse = (scores_of(folder, paired.exported(tmp_path / part, name, "regions-0")) for part, name in students.items())
    selector = {"name": "dns", "student": {**SMALL, "name": "selector"}}
    DnS.model_validate(selector | {"teacher": fine, "coarse": coarse}).distiller({}, 0)
    with pytest.raises(ConfigError, match=r"recipe\.teacher: its scores are those of a coarse student"):
        DnS.model_validate(selector | {"teacher": coarse, "coarse": fine}).distiller({}, 0)
    with pytest.raises(ConfigError, match="coarse student"):
        DnS.model_validate({"name": "dns", "student": FINE, "teacher": coarse}).distiller({}, 0)


def test_a_student_for_features_of_other_dimensions_is_refused(folder: Path) -> None:
    for student, dims in ((FINE | {"num_dims": 8}, 8), ({"name": "selector"}, 512)):
        with pytest.raises(ConfigError, match=f"of {dims} dimensions.*has {paired.NUM_DIMS}"):
            feeder_of(run_of(folder, "dims", student))


def test_rows_without_a_uri_are_listed_and_looked_for(scored: Run) -> None:
    assert verification.list_rejects(scored) == []
    with pytest.raises(ConfigError, match="no video 'x'"):
        takedown.videos_of(scored, "x")


def test_memory_does_not_decide_whose_an_output_is(scored: Run, tmp_path: Path) -> None:
    run = small.changed(scored, f"output={tmp_path}")
    claim.claim_output(run)
    claim.claim_output(small.changed(run, "recipe.cache_bytes=1000"))
    with pytest.raises(ConfigError, match=r"another recipe\.min_positive"):
        claim.claim_output(small.changed(run, "recipe.min_positive=0.6"))


def test_frames_of_a_student_that_reads_none_cannot_be_kept(scored: Run) -> None:
    for override, says in (("labels.mode=live", "labels.mode: .*tee"), ("data.keep_frames=raw", "data.keep_frames: .*none")):
        run = small.changed(scored, override)
        with pytest.raises(ConfigError, match=says):
            planning.label_specs(run, planning.build_teachers(run.recipe.teachers))


def test_coarse_scores_alone_are_refused() -> None:
    recipe = DnS.model_validate({"name": "dns", "student": FINE, "coarse": scores_of(Path("x"), kind="mean")})
    with pytest.raises(ConfigError, match="coarse scores alone"):
        recipe.distiller({}, 0)


def test_repeating_fills_padding() -> None:
    regions = torch.arange(12.0).reshape(2, 6, 1, 1)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    assert repeated(regions, mask).flatten(1).tolist() == [[0, 1, 2, 3, 0, 1], [6, 7, 8, 9, 10, 11]]


def test_losses_do_not_depend_on_the_batch(scored: Run) -> None:
    """Padding to a longer video changes nothing."""
    (whole, *_), torch_seed = batches_of(feeder_of(scored)), torch.manual_seed(0)
    distiller = scored.recipe.distiller({}, 0)
    parts = [{name: rows[i : i + 1] for name, rows in whole.items()} for i in range(len(whole[WEIGHT]))]
    trimmed = [part | {name: part[name][:, :, : _longest(part)] for name in (REGIONS, MASK)} for part in parts]
    for name, (total, count) in distiller(whole).items():
        each = [distiller(part)[name] for part in trimmed]
        torch.testing.assert_close(total, torch.stack([t for t, _ in each]).sum())
        assert count == sum(c for _, c in each)
    assert torch_seed is not None


def _longest(part: Mapping[str, Tensor]) -> int:
    return -(-int(part[MASK].sum(2).max()) // 4) * 4


def test_the_chain_goes_through_and_each_run_only_once(folder: Path) -> None:
    """ViSiL on copies -> fine student -> coarse student -> selector, each a run that is done only once."""
    done: list[str] = []

    def trained(name: str, student: Mapping[str, Any], **recipe: Any) -> str:
        run = run_of(folder, name, {**SMALL, **student}, **recipe)
        if run.recipe.teachers:  # of drawn weights nobody knows the scale
            run = run_of(folder, name, {**SMALL, **student}, min_positive=label(run), **recipe)
        report = training.train(run, lambda _: None)
        assert not report.skipped and training.train(run, lambda _: None).skipped
        training.export_newest(run, f"{folder}/{name}-again")
        assert Path(f"{folder}/{name}-again/model.safetensors").read_bytes() == Path(f"{report.student}/model.safetensors").read_bytes()
        found = run.recipe.evaluate(checkpoint.load_similarity(report.student), batches_of(feeder_of(run, "val")))
        assert set(found) >= {"held-out accuracy"} and all(np.isfinite(value) for value in found.values())
        config, _ = checkpoint.read_export(report.student)
        assert config["features"].startswith("teacher-")
        done.append(name)
        return report.student

    visil = trained("visil", {"name": "visil"})
    fine = trained("fine", {"name": "fine"}, teacher=scores_of(folder, visil))
    coarse = trained("coarse", {"name": "coarse"}, teacher=scores_of(folder, fine))
    both = {"teacher": scores_of(folder, fine), "coarse": scores_of(folder, coarse)}
    trained("selector", {"name": "selector"}, **both, threshold=0.05)
    assert done == ["visil", "fine", "coarse", "selector"]
    teacher = Path(visil) / "config.json"  # trained anew, as the folder tells
    teacher.write_text(teacher.read_text().replace('"step": ', '"step": 1'))
    again = parse(yaml.safe_load(Path(f"{folder}/fine/run.yaml").read_text()))
    with pytest.raises(ConfigError, match="/fine: the student there is finished, and learned from teacher-"):
        training.train(again, lambda _: None)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("with_teacher", [True, False])
def test_runs_of_pairs_are_planned_verified_and_exported(main: Main, folder: Path, tmp_path: Path, with_teacher: bool) -> None:
    """With a teacher of pairs, and with none: what training reads of the store is not in the scratch folder of a plan."""
    teacher = {"teacher": scores_of(folder, kind="mean"), "min_positive": 0.5} if with_teacher else {"margin": 2.0}  # else nothing is left
    run = small.changed(run_of(folder, f"verbs{with_teacher}", FINE, **teacher), "labels.mode=tee", f"output={tmp_path}/out")
    path = tmp_path / "run.yaml"
    path.write_text(dump(run))
    code, out, err = main("plan", path, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [stage["name"] for stage in told["stages"]] == [*(["decode", "teacher"] if with_teacher else []), "student"]
    assert told["epoch_s"] > 0 and (told["label_s"] > 0) == with_teacher
    assert ("teachers" in told["checks"]) == with_teacher and not list((tmp_path / "out").glob("*"))
    if with_teacher:
        assert main("label", path)[0] == 0
    assert main("distill", path)[0] == 0
    code, out, err = main("verify", path, "--rejects", "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["rejects"]) == (0, True, []), err
    assert found["agreement"] == ({"teacher.scores": pytest.approx(1, abs=1e-5)} if with_teacher else {})
    assert main("export", path, tmp_path / "again")[0] == 0
    trained, again = (checkpoint.load_similarity(str(place)).state_dict() for place in (tmp_path / "out" / "student", tmp_path / "again"))
    torch.testing.assert_close(dict(again), dict(trained), rtol=0, atol=0)
    code, out, _ = main("evaluate", path)
    assert code == 0 and "held-out accuracy" in out
    assert main("labels", "ls", f"{folder}/labels")[0] == main("status", f"{folder}/labels")[0] == 0


def test_rejected_pairs_are_listed_by_their_ids(scored: Run, tmp_path: Path) -> None:
    run = small.copied(scored, tmp_path)
    plan, sets = open_sets(run, Plan.of(run))
    first = plan.examples(plan.chunks[0])
    sets["teacher"].forget(0, plan.chunks[0], first["example_id"].to_pylist()[:1])
    assert [(reject.clip, reject.kind) for reject in list_rejects(run)] == [(first["video_id"][0].as_py(), "forgotten")]
