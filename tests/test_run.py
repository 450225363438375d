"""Run files: what they say, how they are overridden, and errors that name the key."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import small
import yaml

from vkd import models, planning
from vkd.clips import ClipPlan
from vkd.errors import ConfigError
from vkd.run import dump, load, load_one, parse
from vkd.students import STUDENTS

JOBS = Path(__file__).parents[1] / "jobs"


@pytest.fixture
def tree(tmp_path: Path) -> small.Tree:
    return small.tree_of(tmp_path)


RUNS = sorted(path for path in JOBS.glob("*.yaml") if path.name != "runtime_env.yaml")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_shipped_job_loads(path: Path) -> None:
    for run in load(path):
        assert parse(yaml.safe_load(dump(run))) == run


@pytest.mark.parametrize("path", sorted(JOBS.glob("dns*.yaml")), ids=lambda path: path.name)
def test_models_of_the_shipped_chain_can_be_built(path: Path) -> None:
    """Files that earlier runs make are not there yet, and are not read for this; places that one run writes another one reads."""
    for run in load(path):
        planning.build_teachers(run.recipe.teachers)
        if run.recipe.trains:
            models.build(run.recipe.student, STUDENTS, "student")
            assert planning.student_sampling(run) is None
        read = [spec.options.get(key) for spec in run.recipe.teachers.values() for key in ("path", "whitening")]
        read += [] if run.index is None else [run.index.coarse, run.index.fine, run.index.selector]
        written = [f"{other.output}/student" for other in load(JOBS / "dns.yaml") + load(JOBS / "dns_reference.yaml")]
        written += [other.whitening.out for other in load(JOBS / "dns.yaml") + load(JOBS / "dns_reference.yaml") if other.whitening]
        assert {str(Path(place).absolute()) for place in read if place} <= set(written)


def test_there_are_shipped_jobs() -> None:
    assert len(RUNS) >= 4


def test_what_is_left_out_has_its_default(tree: small.Tree) -> None:
    for section in ("train", "checkpoint"):
        del tree[section]
    run = parse(tree)
    assert (run.train.epochs, run.checkpoint.keep, run.data.views.count, run.compute.profile) == (10, 2, 1, "auto")
    assert run.labels.mode == "stored"


def test_a_dump_loads_back_to_the_same_run(tree: small.Tree) -> None:
    tree["recipe"]["weights"] = {"kl": 0.5, "similarity": 2}
    tree["data"]["views"] = {"count": 3, "min_scale": 0.25}
    run = parse(tree)
    again = parse(yaml.safe_load(dump(run)))
    assert again == run
    assert dump(again) == dump(run)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.epochs=3", 3),
        ("train.learning_rate=1e-4", 1e-4),
        ("labels.allow_partial=true", True),
        ("data.source=null", None),
        ("data.clips={plan: count, count: 2}", ClipPlan(plan="count", count=2)),
        ("labels.encodings.logits=topk:4", "topk:4"),
        ("compute.address=ray://head:10001", "ray://head:10001"),
        ("compute.decode.workers=2", 2),
    ],
)
def test_overrides_are_yaml_by_dotted_key(tree: small.Tree, override: str, value: Any) -> None:
    found: Any = parse(tree, [override])
    for name in override.partition("=")[0].split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins(tree: small.Tree) -> None:
    assert parse(tree, ["train.epochs=3", "train.epochs=4"]).train.epochs == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys, at every depth
        ("ouput=x", "unknown key 'ouput' -> did you mean 'output'?"),
        ("train.epoch=1", "unknown key 'train.epoch' -> did you mean 'epochs'?"),
        ("data.views.cout=2", "unknown key 'data.views.cout' -> did you mean 'count'?"),
        ("compute.teacher.gpu=1", "unknown key 'compute.teacher.gpu' -> did you mean 'gpus'?"),
        ("recipe.temprature=1", "unknown key 'recipe.temprature' -> did you mean 'temperature'?"),
        ("recipe.weights.cosin=1", "unknown key 'recipe.weights.cosin' -> did you mean 'cosine'?"),
        ("probe={out: a, labels: b}", "unknown key 'probe.labels' -> did you mean 'label'?"),
        ("whitening={out: a, dims: 0}", "whitening.dims: Input should be greater than or equal to 1, not 0"),
        ("train.zzz=1", "unknown key 'train.zzz' -> known there: epochs, batch_size"),
        # wrong types, ranges and choices
        ("train.epochs=many", "train.epochs: Input should be a valid integer"),
        ("train.epochs=", "train.epochs: Input should be a valid integer, not None"),
        ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1, not 0"),
        ("data.views=3", "data.views: Input should be a valid dictionary"),
        ("data.split.by=tim", "data.split.by: Input should be 'none', 'column', 'time' or 'group', not 'tim'"),
        ("labels.encodings=fp16", "labels.encodings: Input should be a valid dictionary"),
        ("labels.store=3", "labels.store: a place is the path or uri of a folder, not 3"),
        ("output=", "output: a place is the path or uri of a folder, not None"),
        ("name=a b", "name: String should match pattern"),
        ("data={manifest: m, source: s, copies: {out: o, per_vide: 3}}", "unknown key 'data.copies.per_vide' -> did you mean 'per_video'?"),
        ("probe={out: o, labels: 3}", "unknown key 'probe.labels' -> did you mean 'label'?"),
        # values that do not go together
        ("data.copies={out: o}", "data: copies are made of the videos of source: name it"),
        ("data.clips={plan: windows}", "data.clips: plan: windows needs length_s"),
        ("recipe.weights={kl: 0, cosine: 0}", "recipe.weights: all weights are 0"),
        # recipes and models
        ("recipe=kd", "recipe: a recipe is a mapping with a name, not 'kd'"),
        ("recipe={teacher: a}", "recipe: a recipe is a mapping with a name"),
        ("recipe.name=dk", "recipe.name: unknown recipe 'dk' -> use one of dns, kd"),
        ("recipe.name=json:loads", "recipe: 'json:loads' is no recipe"),
        ("recipe.weights.kl=-1", "recipe.weights.kl: Input should be greater than or equal to 0, not -1"),
        ("recipe.teacher={variant: 2}", "recipe.teacher.name: Input should be a valid string, not None"),
        ("recipe.student=3", "recipe.student: Input should be a valid dictionary"),
        # overrides that are none
        ("train.epochs", "'train.epochs' is not KEY=VALUE"),
        ("=3", "'=3' is not KEY=VALUE"),
        ("train.epochs.x=3", "train.epochs.x: epochs is not a section"),
        ("train.epochs=[", "the value is not YAML"),
    ],
)
def test_an_error_names_the_key_and_what_was_expected(tree: small.Tree, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(tree, [override])
    assert message in str(raised.value)
    assert raised.value.exit_code == 2
    assert raised.value.action


@pytest.fixture
def phased(tree: small.Tree) -> small.Tree:
    """A run of a recipe with phases: 5 epochs."""
    labels = {"mode": "stored", "store": tree["labels"]["store"]}
    return tree | {"recipe": copy.deepcopy(small.STAGED), "train": {"batch_size": 8}, "labels": labels}


def test_phases_say_how_many_epochs_there_are(phased: small.Tree) -> None:
    run = parse(phased)
    assert run.train.epochs == 5
    assert parse(yaml.safe_load(dump(run))) == run
    assert parse(phased | {"train": {"batch_size": 8, "epochs": 5}}) == run
    assert parse(phased, ["recipe.cascade.joint=9"]).train.epochs == 12
    del phased["train"]
    assert parse(phased).train.epochs == 12


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=4", "train: the phases of this recipe have 5 epochs: change them there, and leave train.epochs out"),
        ("labels.mode=live", "recipe: it looks at labels again, and labels.mode live keeps none: set that to tee"),
        ("recipe.cascade={warmup: 0, per_stage: 0, joint: 0}", "recipe: cascade has no epoch: set warmup, per_stage or joint above 0"),
        ("recipe.cascade.joint=-1", "recipe.cascade.joint: Input should be greater than or equal to 0"),
        ("recipe.refine.start_epoch=3", "recipe: refine.start_epoch follows from cascade: leave it out"),
        ("recipe.harmonise.clip=[2, 1]", "recipe.harmonise: clip is the lowest and the highest weight"),
        ("recipe.fd.mdd=1", "unknown key 'recipe.fd.mdd' -> did you mean 'mmd'?"),
    ],
)
def test_what_phases_do_not_allow_is_refused(phased: small.Tree, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(phased, [override])
    assert message in str(raised.value)
    assert raised.value.where and raised.value.action


def test_a_missing_key_is_named(tree: small.Tree) -> None:
    del tree["data"]["manifest"]
    with pytest.raises(ConfigError, match=r"^run.yaml: data\.manifest: Field required"):
        parse(tree, where="run.yaml")


def test_local_places_become_absolute_and_uris_stay(tree: small.Tree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run = parse(tree, ["output=out/", "labels.store=s3://bucket/labels", "data.manifest=~/manifest"])
    assert run.output == str(tmp_path / "out")
    assert run.labels.store == "s3://bucket/labels"
    assert run.data.manifest == str(Path.home() / "manifest")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("- a", "is not a mapping"), ("", "is not a mapping"), ("\x00", "is not YAML"), (None, "cannot read")],
)
def test_a_file_that_is_no_run_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load(path)
    assert raised.value.where == str(path)


def test_a_workflow_is_runs_in_order_with_their_own_overrides(tree: small.Tree, tmp_path: Path) -> None:
    small.write(tree, tmp_path / "a.yaml")
    steps = [{"run": "a.yaml"}, {"run": "a.yaml", "set": ["name=second", "train.epochs=7"]}]
    path = small.write({"runs": steps}, tmp_path / "workflow.yaml")
    first, second = load(path, ["train.seed=5"])
    assert (first.name, first.train.epochs, first.train.seed) == ("small", 3, 5)
    assert (second.name, second.train.epochs, second.train.seed) == ("second", 7, 5)
    with pytest.raises(ConfigError, match="is a workflow of 2 runs"):
        load_one(path)
    assert load_one(tmp_path / "a.yaml") == parse(tree)


@pytest.mark.parametrize(
    ("workflow", "message"),
    [
        ({"runs": []}, r"runs: .* should have at least 1 item"),
        ({"runs": [{"run": "a.yaml", "sett": []}]}, r"unknown key 'runs\.0\.sett' -> did you mean 'set'\?"),
        ({"runs": [{"run": "gone.yaml"}]}, r"gone\.yaml: cannot read"),
        ({"runs": [{"run": "workflow.yaml"}]}, r"workflow\.yaml: name: Field required"),
    ],
)
def test_bad_workflows(tmp_path: Path, workflow: small.Tree, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(small.write(workflow, tmp_path / "workflow.yaml"))
