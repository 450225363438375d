"""The recipe `substage`: what learns in which phase, from what, and that neither the order of clips nor their storage matters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import staged
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from staged import JOINT, NAMES, NUM_CLASSES, PHASES, distiller, means
from torch import Tensor, nn

from vkd import checkpoint, gather, models
from vkd.clips import Sampling
from vkd.descriptors import Descriptor
from vkd.errors import ConfigError
from vkd.losses import response
from vkd.losses.adapters import DescriptorAdapter
from vkd.models import ModelSpec, find
from vkd.recipes import RECIPES
from vkd.recipes.base import Batch
from vkd.recipes.substage import Substage
from vkd.recipes.substage.harmonise import MIN_BASE, Harmoniser, harmonised
from vkd.recipes.substage.knowledge import Knowledge
from vkd.recipes.substage.schedule import parts_of, steps_of
from vkd.schema import TensorType
from vkd.store import encodings
from vkd.students import STUDENTS
from vkd.students.base import Student
from vkd.teachers.student import StudentTeacher

OFF = {"moments": 0.0, "mmd": 0.0, "temporal": 0.0}
EVERY_PHASE = pytest.mark.parametrize("phase", range(len(PHASES)), ids=PHASES)


class Normed(Student):
    """Its stages have a BatchNorm, and its end a dropout: buffers and modes matter."""

    def __init__(self, heads: dict[str, int]) -> None:
        super().__init__(Sampling(num_frames=4, size_px=32), 6, heads)
        self.first = nn.Sequential(nn.Conv3d(3, 4, 4, 8, padding=(2, 0, 0)), nn.BatchNorm3d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv3d(4, 6, 1), nn.BatchNorm3d(6), nn.ReLU(), nn.Dropout(0.1))
        self.substages = ("first", "second")

    def features(self, clips: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(clips.transpose(1, 2))).mean(dim=(2, 3, 4))
        return found


def test_registered() -> None:
    assert find(ModelSpec(name="substage"), RECIPES, "recipe") is Substage


# which parts learn when


@pytest.mark.parametrize(
    ("name", "options", "first", "last"),
    [
        ("tiny_r3d", {}, ["stem.", "layer1."], ["heads.", "layer4."]),
        ("shift_cnn", {"size": "medium"}, ["stem.", "blocks.0."], ["heads.", "blocks.3.", "blocks.4."]),
        ("tiny_vit", {}, ["positions", "embed.", "blocks.0."], ["heads.", "blocks.3.", "norm."]),
    ],
)
def test_a_student_falls_into_substages(name: str, options: dict[str, Any], first: list[str], last: list[str]) -> None:
    student: Student = models.build(ModelSpec(name=name, options=options), STUDENTS, "student", heads={"logits": 3})
    parts = parts_of(student, student.substages)
    assert sorted(name for part in parts for name in part) == sorted(parameter for parameter, _ in student.named_parameters())
    for part, prefixes in ((parts[0], first), (parts[-1], last)):
        assert {next(prefix for prefix in prefixes if parameter.startswith(prefix)) for parameter in part} == set(prefixes)


def test_parts_inside_of_parts() -> None:
    student = staged.distiller(0).student
    first, second = parts_of(student, ["layer2.conv1", "layer3"])
    assert {name.rpartition(".")[0] for name in first} == {"stem.0", "stem.1", "layer1.conv1", "layer1.norm1", "layer1.conv2"} | {
        "layer1.norm2",
        "layer2.conv1",
    }
    assert "layer2.conv2.weight" in second and "heads.logits.weight" in second and "layer4.conv1.weight" in second


def test_the_cascade() -> None:
    cascade = staged.recipe(cascade={"warmup": 2, "per_stage": 3, "joint": 4}).cascade
    steps = steps_of(cascade, 3, prefix=True)
    assert [(s.name, s.epochs, s.exits, s.newest) for s in steps] == [
        ("warm-up", 2, (2,), 2),
        ("substage 1", 3, (0,), 0),
        ("substage 2", 3, (0, 1), 1),
        ("substage 3", 3, (0, 1, 2), 2),
        ("joint", 4, (0, 1, 2), 2),
    ]
    assert [s.exits for s in steps_of(cascade, 3, prefix=False)] == [(2,), (0,), (1,), (2,), (2,)]
    assert [s.name for s in steps_of(staged.recipe(cascade={"warmup": 0, "per_stage": 0}).cascade, 3, prefix=True)] == ["joint"]
    assert staged.recipe(cascade={"warmup": 2, "per_stage": 3, "joint": 4}).num_epochs == 15


@pytest.mark.parametrize(("warmup", "per_stage", "start"), [(2, 3, 4), (0, 1, 0), (2, 0, 2), (0, 0, 0)])
def test_labels_are_refined_from_the_end_of_the_first_substage_on(warmup: int, per_stage: int, start: int) -> None:
    cascade = {"warmup": warmup, "per_stage": per_stage, "joint": 4}
    assert staged.recipe(cascade=cascade).refinement.start_epoch == start
    assert staged.recipe(cascade=cascade, refine={"form": "argmax"}).refinement.start_epoch == 0


@pytest.mark.parametrize("freeze", [False, True])
def test_rates_of_the_phases(freeze: bool) -> None:
    module = distiller(0, cascade={"freeze": freeze, "lower_lr": 0.2})
    parts, phases, knowledge = parts_of(module.student, NAMES), module.phases(), cast(Knowledge, module.knowledge)
    assert [phase.name for phase in phases] == PHASES
    assert [phase.schedule for phase in phases] == ["linear", *["cosine"] * 4]
    assert phases[0].rates == dict.fromkeys([f"student.{name}" for name, _ in module.student.named_parameters()], 1.0)
    for k in range(3):
        rates, head = phases[k + 1].rates or {}, k == 2
        for j, names in enumerate(parts):
            expected = 0.0 if j > k or (freeze and j < k) else 1.0 if j == k else 0.2
            body = [name for name in names if not name.startswith("heads.")]
            assert {rates.get(f"student.{name}", 0.0) for name in body} == {expected}
            if j < 2:
                assert {rates.get(f"exits.{j}.{name}", 0.0) for name, _ in module.exits[j].named_parameters()} == {expected}
            assert {rates.get(f"knowledge.adapters.{j}-{knowledge.partner[j]}.of_means.weight", 0.0)} == {expected}
        assert ("student.heads.logits.weight" in rates) == head
        assert "fusion" not in rates
    joint = phases[-1].rates or {}
    every = {name for name, _ in module.named_parameters() if not name.startswith("assistant.")}
    assert set(joint) == every and set(joint.values()) == {1.0}


SWITCHES = st.fixed_dictionaries(
    {
        "combos": st.fixed_dictionaries({name: st.booleans() for name in ("prefix", "pair", "fused")}),
        "fd": st.sampled_from([{}, OFF, OFF | {"mmd": 1.0}, {"teaches": False}]),
        "rel": st.sampled_from([{}, {"correspondence": "soft"}, {"sp": 0.0, "corr": 0.0, "pair": 0.0}]),
        "harmonise": st.sampled_from([{}, {"form": "uncertainty"}, {"form": "uniform"}]),
        "cascade": st.fixed_dictionaries({"freeze": st.booleans(), "assistant_beta": st.sampled_from([0.0, 0.3])}),
    }
)
SOFT_PAIRS = {"fd": OFF, "rel": {"correspondence": "soft"}, "combos": {}, "harmonise": {}, "cascade": {}}
ONLY_PAIRS = {"fd": OFF, "rel": {}, "combos": {"prefix": False}, "harmonise": {"form": "uncertainty"}, "cascade": {"freeze": True}}


@settings(max_examples=5)
@given(SWITCHES, st.sampled_from([9, 5, 0]))
@example(SOFT_PAIRS, 9)
@example(SOFT_PAIRS, 5)
@example(ONLY_PAIRS, 5)
@example(ONLY_PAIRS, 9)
def test_what_learns_gets_a_gradient_and_nothing_else(switches: dict[str, Any], num_rows: int) -> None:
    """In every phase, of few rows too, and of a masked one: DistributedDataParallel waits for all of them."""
    module, data = distiller(0, **switches), staged.batch(max(num_rows, 1))  # above and below what relations need
    data["weight"] *= num_rows > 0
    for phase in range(len(PHASES)):
        staged.enter(module, phase)
        loss, found = gather.total_loss(module(data))
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(value.isfinite() for value in found.values())
        with_gradient = {name for name, p in module.named_parameters() if p.grad is not None}
        assert with_gradient == {name for name, p in module.named_parameters() if p.requires_grad}, PHASES[phase]
        later = parts_of(module.student, NAMES)[module.step.newest + 1 :]
        assert not with_gradient & {f"student.{name}" for part in later for name in part}


@pytest.mark.parametrize("freeze", [False, True])
def test_frozen_substages_stay_as_they_are(freeze: bool) -> None:
    """Parameters, buffers and all, while what is above them learns from real steps."""
    student = {"name": f"{__name__}:Normed"}
    module, data = distiller(0, student=student, substages=None, cascade={"freeze": freeze}), staged.batch(9)
    low, high = {"first"}, {"second", "heads"}
    learn = [low | high, low, high if freeze else low | high, low | high]
    for phase, expected in enumerate(learn):
        staged.enter(module, phase)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        for _ in range(3):
            optimizer.zero_grad()
            gather.total_loss(module(data))[0].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
        moved = {part for part in ("first", "second", "heads") if any(name.startswith(f"student.{part}.") for name in changed)}
        assert moved == expected
        assert ("student.first.1.running_mean" in changed) == (phase != 2 or not freeze)
        assert not any(name.startswith("assistant.") for name in changed)


# what is learned


@pytest.mark.parametrize("correspondence", ["hard", "soft"])
def test_who_is_the_teacher_has_nothing_to_learn(correspondence: str) -> None:
    """Identity adapters, and a teacher that describes and answers as the student does."""
    alone = {"assistant_beta": 0}
    module = distiller(0, stages=[4, 6, 8], resp={"rho": (1, 1)}, rel={"correspondence": correspondence}, cascade=alone)
    assert module.knowledge is not None
    for name, adapter in module.knowledge.adapters.items():
        if len(set(name.split("-"))) == 1:
            assert isinstance(adapter, DescriptorAdapter)
            for linear in (adapter.of_means, adapter.of_deviations):
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
    data = staged.batch()
    for _ in range(2):  # the harmoniser has followed the warm-up
        own = taught_by(module.student, data)
        assert means(module, own) == pytest.approx({"resp/3": 0}, abs=1e-6)
    for phase in (3, JOINT):
        staged.enter(module, phase)
        found = means(module, own)
        zero = ["resp/3", *(f"rel/{k}" for k in (1, 2, 3)), *(f"fd/{k}" for k in (1, 2, 3) if correspondence == "hard")]
        assert {name: found[name] for name in zero} == pytest.approx(dict.fromkeys(zero, 0.0), abs=1e-6)
    if correspondence == "hard":
        assert [module.metrics()[f"alpha/{k}"] for k in (1, 2, 3)] == pytest.approx([1, 1, 1], abs=1e-6)
    assert [module.metrics()[f"cka/{k}"] for k in (1, 2, 3)] == pytest.approx([1, 1, 1], abs=1e-5)


def taught_by(student: Student, data: Batch) -> Batch:
    """The rows with a student's own answers and descriptors as the teacher's."""
    with torch.no_grad():
        maps, answers = student.stages(data["frames"], NAMES)
    described = {f"teacher.stage{k}": Descriptor(x.shape[1])(x) for k, x in enumerate(maps, 1)}
    return data | described | {"teacher.logits": answers["logits"]}


@EVERY_PHASE
def test_the_order_of_clips_does_not_matter(phase: int) -> None:
    data = staged.batch()
    order = torch.randperm(len(data["weight"]), generator=torch.Generator().manual_seed(1))
    shuffled = {name: tensor[order] for name, tensor in data.items()}
    expected = means(distiller(phase), data)
    assert len(expected) == [1, 3, 6, 9, 10][phase]
    assert means(distiller(phase), shuffled) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_masked_rows_count_nothing() -> None:
    data = staged.batch()
    more = {name: torch.cat([tensor, tensor[:3]]) for name, tensor in data.items()}
    more["weight"][32:] = 0
    more["teacher.stage1"][32:] = more["teacher.logits"][32:] = torch.nan
    assert means(distiller(JOINT), more) == pytest.approx(means(distiller(JOINT), data), rel=1e-5)


def test_each_substage_has_its_own_losses() -> None:
    found = means(distiller(JOINT), staged.batch())
    assert set(found) == {f"{kind}/{k}" for kind in ("resp", "fd", "rel") for k in (1, 2, 3)} | {"resp/fused"}
    assert len(set(found.values())) == len(found)
    assert set(distiller(JOINT, combos={"prefix": False})(staged.batch())) == {"resp/3", "fd/3", "rel/3"}
    assert set(distiller(2, fd=OFF)(staged.batch())) == {"resp/1", "resp/2", "rel/1", "rel/2"}


def test_features_that_teach_nothing_only_weigh_the_substages() -> None:
    """The student's gradients are those without them; their adapters learn, and the losses are the same."""
    off, data = {"sp": 0.0, "corr": 0.0, "pair": 0.0}, staged.batch()
    taught, watched, without = (distiller(JOINT, fd=fd, rel=off, harmonise={"form": "uniform"}) for fd in ({}, {"teaches": False}, OFF))
    for module in (taught, watched, without):
        gather.total_loss(module(data))[0].backward()  # type: ignore[no-untyped-call]
    for mine, other in zip(watched.student.parameters(), without.student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert watched.knowledge is not None and taught.knowledge is not None
    for mine, other in zip(watched.knowledge.parameters(), taught.knowledge.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert means(watched, data) == pytest.approx(means(taught, data))
    assert (watched.regularisers, taught.regularisers) == (("fd",), ())


def test_earlier_substages_count_half_until_all_learn() -> None:
    data, last, joint = staged.batch(), distiller(3, cascade={"assistant_beta": 0}), distiller(JOINT)
    half, whole = means(last, data), means(joint, data)
    for kind in ("resp", "fd", "rel"):
        ratios = [half[f"{kind}/{k}"] / whole[f"{kind}/{k}"] for k in (1, 2, 3)]
        assert ratios == pytest.approx([0.5, 0.5, 1.0])


def test_temperature_and_share_go_from_end_to_end() -> None:
    module, data = distiller(JOINT, resp={"rho": (0.8, 0.4), "tau": (8, 2)}), staged.batch()
    with torch.no_grad():
        found = module(data)
        maps, answers = module.student.stages(data["frames"], NAMES)
        logits = [module.exits[k](maps[k], data["weight"]) for k in range(2)] + [answers["logits"]]
        for k, (rho, tau) in enumerate([(0.8, 8.0), (0.6, 5.0), (0.4, 2.0)]):
            taught = (data["teacher.logits"] / tau).softmax(dim=1)
            kl = (taught * (taught.log() - (logits[k] / tau).log_softmax(dim=1))).sum(dim=1)
            ce = -(data["refined.q"] * logits[k].log_softmax(dim=1)).sum(dim=1) * data["refined.omega"][:, 0]
            assert found[f"resp/{k + 1}"][0].item() == pytest.approx(((1 - rho) * ce + rho * tau**2 * kl).sum().item(), rel=1e-4)


@pytest.mark.parametrize("combos", [{}, {"prefix": False}, {"fused": False}])
def test_the_assistant_is_the_student_of_before_and_helps_where_it_agrees(combos: dict[str, bool]) -> None:
    module, data = distiller(2, combos=combos), staged.batch()
    helper = cast(Tensor, module._helper(data))
    with torch.no_grad():
        maps, _ = module.student.stages(data["frames"], NAMES, num_stages=1)
        torch.testing.assert_close(helper, module.exits[0].eval()(maps[0], data["weight"]))
        for parameter in module.student.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(module._helper(data), helper)
    likes = helper.argmax(dim=1)
    for agrees in (True, False):
        target = nn.functional.one_hot((likes + (not agrees)) % NUM_CLASSES, NUM_CLASSES).float()
        own = data | {"refined.q": target}
        beta, (rho, tau) = 0.3 * agrees, (0.7, 6.0)
        taught = (1 - beta) * response.soften(data["teacher.logits"], tau) + beta * response.soften(helper, tau)
        logits = torch.randn(len(target), NUM_CLASSES)
        mix = response.Mix(rho, tau)
        expected = response.response(logits, target, taught, mix, own["weight"], own["refined.omega"][:, 0])
        torch.testing.assert_close(module._response(1, logits, own, helper), expected)
    for phase in (0, 1, JOINT):
        module.enter(phase)
        assert module._helper(data) is None


def test_fewer_teacher_stages_are_shared() -> None:
    assert distiller(0).knowledge.partner == [0, 0, 1]  # type: ignore[union-attr]
    assert distiller(0, stages=[3, 4, 5, 6, 7, 8]).knowledge.partner == [1, 3, 5]  # type: ignore[union-attr]
    assert distiller(0, stages=[3]).knowledge.partner == [0, 0, 0]  # type: ignore[union-attr]


def test_one_substage_is_kd_with_one_feature_loss() -> None:
    module, data = distiller(2, substages=["layer4"]), staged.batch()
    assert module.step.joint and module.exits is not None and len(module.exits) == 0
    assert set(means(module, data)) == {"resp/1", "fd/1", "rel/1"}


@pytest.mark.parametrize(("encoding", "tolerance"), [("fp32", 1e-6), ("fp16", 5e-3)])
@EVERY_PHASE
def test_stored_descriptors_teach_what_a_live_teacher_does(tmp_path: Path, phase: int, encoding: str, tolerance: float) -> None:
    spec, data = ModelSpec(name="tiny_r3d", options={"num_frames": 4, "size_px": 32, "widths": [5, 5, 7, 9]}), staged.batch()
    torch.manual_seed(5)
    checkpoint.export(models.build(spec, STUDENTS, "student", heads={"logits": NUM_CLASSES}), spec, str(tmp_path), {})
    teacher = StudentTeacher(str(tmp_path), substages=NAMES, descriptors="full")
    teacher.load("cpu")
    live = {name: labels for name, labels in teacher({"frames": data["frames"].numpy()}).items() if name in teacher.emits}
    stored = {name: stored_as(labels, teacher.emits[name], encoding) for name, labels in live.items()}
    stages = [teacher.emits[f"stage{k}"].row_shape[-1] for k in (1, 2, 3)]
    a, b = (
        means(distiller(phase, stages), data | {f"teacher.{name}": torch.tensor(labels) for name, labels in each.items()})
        for each in (live, stored)
    )
    assert a == pytest.approx(b, rel=tolerance, abs=tolerance * 1e-2)


def stored_as(labels: np.ndarray, tensor: TensorType, encoding: str) -> np.ndarray:
    columns = encodings.encode("x", labels, np.ones(len(labels), bool), tensor, encoding)
    return np.asarray(encodings.decode(pa.table([array for _, array in columns], schema=pa.schema([f for f, _ in columns])), "x"))


def test_it_learns() -> None:
    """All phases on 12 clips whose labels are their colours': every exit knows most of them then, and all losses fell."""
    module, data = distiller(0), staged.batch(12)
    right = data["frames"][..., 0].float().mean(dim=(1, 2, 3)).argsort().argsort() * NUM_CLASSES // len(data["label"])
    target = nn.functional.one_hot(right, NUM_CLASSES).float()
    data |= {"label": right, "refined.q": target, "refined.omega": torch.ones(len(right), 1), "teacher.logits": 6 * target}
    for phase in range(len(PHASES)):
        staged.enter(module, phase)
        optimizer, history = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.02), []
        for _ in range(10):
            loss, _ = gather.total_loss(module(data))
            history.append(loss.item())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        assert history[-1] < history[0], PHASES[phase]
    module.metrics()
    module(data)
    told = module.metrics()
    assert all(told[f"accuracy/{k}"] > 0.5 for k in (1, 2, 3))


# how substages are weighed


def test_weights_by_hand() -> None:
    assert harmonised(torch.tensor([1.0, 2.0, 4.0]), 1.0, (0.25, 2.5)).tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7])
    assert harmonised(torch.tensor([1.0, 2.0, 4.0]), 2.0, (0.25, 2.5)).tolist() == pytest.approx([0.679623, 0.961132, 1.359245], abs=1e-5)
    assert harmonised(torch.tensor([1.0, 97.0, 1.0, 1.0]), 1.0, (0.25, 2.5)).tolist() == pytest.approx([4 / 13, 40 / 13, 4 / 13, 4 / 13])


@settings(max_examples=30)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), st.floats(0.1, 10))
def test_weights_have_a_mean_of_one(ratios: list[float], tau: float) -> None:
    weights = harmonised(torch.tensor(ratios), tau, (0.25, 2.5))
    assert weights.mean().item() == pytest.approx(1, rel=1e-5)
    assert weights.max() <= 10 * weights.min() * (1 + 1e-5)
    assert all((weights[i] <= weights[j] * (1 + 1e-5)) for i, a in enumerate(ratios) for j, b in enumerate(ratios) if a < b)


def test_a_harmoniser_compares_with_the_end_of_the_warm_up() -> None:
    harmoniser = Harmoniser(2, 1.0, (0.25, 2.5))
    assert harmoniser.weights().tolist() == [1, 1]
    for value in (1.0, 2.0):
        harmoniser.add(0, torch.tensor(value))
    assert harmoniser.ema[0].item() == pytest.approx(1.1)
    harmoniser.start()
    assert harmoniser.weights().tolist() == [1, 1]
    for _ in range(200):
        harmoniser.add(0, torch.tensor(3.3))
        harmoniser.add(1, torch.tensor(5.0))
    assert harmoniser.weights().tolist() == pytest.approx([1.5, 0.5], rel=1e-4)  # nothing is known of the second before
    harmoniser.start()
    assert harmoniser.base.tolist() == pytest.approx([1.1, 5.0], rel=1e-4)


def test_a_base_of_nothing_has_a_floor() -> None:
    harmoniser = Harmoniser(2, 1.0, (0.25, 2.5))
    for k in range(2):
        harmoniser.add(k, torch.tensor(0.0))
    harmoniser.start()
    assert harmoniser.weights().tolist() == [1, 1]
    harmoniser.add(0, torch.tensor(20 * MIN_BASE))
    assert harmoniser.weights().tolist() == pytest.approx([4 / 3, 2 / 3])


def test_the_warm_up_is_followed() -> None:
    module = distiller(0)
    assert module.knowledge is not None
    for seed in range(2):
        module(staged.batch(seed=seed))
    harmoniser = module.knowledge.harmoniser
    assert not harmoniser.ema.isnan().any() and harmoniser.base.isnan().all()
    assert not module.knowledge.alike.isnan().any() and not module.knowledge.get_buffer("scale0").isnan().any()
    staged.enter(module, 1)
    assert harmoniser.base.equal(harmoniser.ema)
    before = {name: tensor.clone() for name, tensor in module.knowledge.named_buffers()}
    module.eval()(staged.batch(seed=7))
    assert all(tensor.nan_to_num(-1).equal(before[name].nan_to_num(-1)) for name, tensor in module.knowledge.named_buffers())
    assert module.metrics().keys() >= {"alpha/1", "alpha/2", "alpha/3", "cka/1"}


def test_uncertainty_learns_the_weights() -> None:
    data, plain = staged.batch(), means(distiller(JOINT, harmonise={"form": "uniform"}), staged.batch())
    module = distiller(JOINT, harmonise={"form": "uncertainty"})
    assert module.uncertainty is not None
    with torch.no_grad():
        module.uncertainty.copy_(torch.tensor([1.0, 2.0, 4.0]).log())
    found = means(module, data)
    for kind in ("resp", "fd", "rel"):
        assert [found[f"{kind}/{k + 1}"] / plain[f"{kind}/{k + 1}"] for k in range(3)] == pytest.approx([1, 0.5, 0.25], rel=1e-4)
    assert found["uncertainty"] == pytest.approx(math.log(8))
    assert [module.metrics()[f"alpha/{k}"] for k in (1, 2, 3)] == pytest.approx([1, 0.5, 0.25])
    alone = distiller(JOINT, harmonise={"form": "uncertainty"}, combos={"prefix": False})
    gather.total_loss(alone(data))[0].backward()  # type: ignore[no-untyped-call]
    assert alone.uncertainty is not None and alone.uncertainty.grad is not None
    assert alone.uncertainty.grad[:2].tolist() == [0, 0]  # what has no loss has no weight to learn


# what is told


def test_accuracy_is_of_labelled_rows_that_are_trained_on() -> None:
    module, data = distiller(JOINT), staged.batch()
    with torch.no_grad():
        module(data)
        module.eval()(data | {"label": torch.zeros_like(data["label"])})  # somebody looks
        answers = module.student(data["frames"])["logits"].argmax(dim=1)
    known = data["label"] >= 0
    found = module.metrics()
    assert found["accuracy/3"] == pytest.approx((answers[known] == data["label"][known]).float().mean().item())
    assert not any(name.startswith("accuracy") for name in module.metrics())


def test_validation_wants_the_newest_exit() -> None:
    data = staged.batch()
    for phase in range(len(PHASES)):
        module = distiller(phase, cascade={"assistant_beta": 0}).eval()
        total, count = module.score(data)
        name = "resp/fused" if phase == JOINT else f"resp/{module.step.newest + 1}"
        torch.testing.assert_close((total, count), module(data)[name])


@EVERY_PHASE
def test_it_says_probabilities(phase: int) -> None:
    module = distiller(phase)
    module(staged.batch())
    assert module.said is not None and not module.said.requires_grad
    torch.testing.assert_close(module.said.sum(dim=1), torch.ones(staged.NUM_ROWS))


# what is wrong


@pytest.mark.parametrize(
    ("fields", "emits", "num_classes", "message"),
    [
        ({}, staged.emits(), 0, r"recipe: the labels name 0 classes.*build the manifest from a table that has the column 'label'"),
        ({}, staged.emits(), 1, r"recipe: the labels name 1 classes"),
        ({}, staged.emits(num_classes=4), 3, r"recipe\.teacher: the teacher's logits have shape \[4\]; the labels have 3.*vkd probe RUN"),
        ({}, {"teacher": {}}, 3, r"recipe\.teacher: the teacher emits no 'logits'.*vkd probe RUN"),
        ({}, staged.emits(()), 3, r"recipe\.teacher\.substages: the teacher emits no stage descriptors.*option substages"),
        ({"substages": ["layer2", "leyer3"]}, staged.emits(), 3, r"substages: TinyR3D has no part 'leyer3'.*did you mean layer3"),
        ({"substages": ["layer2", "heads"]}, staged.emits(), 3, r"substages: .*'heads' does not run"),
    ],
)
def test_what_does_not_go_together_says_what_to_do(fields: dict[str, Any], emits: Any, num_classes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        staged.recipe(**fields).distiller(emits, num_classes)
    assert raised.value.where and raised.value.action


def test_descriptors_are_not_needed_when_nothing_is_learned_from_them() -> None:
    off = {"sp": 0.0, "corr": 0.0, "pair": 0.0}
    module = staged.recipe(fd=OFF, rel=off).distiller(staged.emits(()), 3)
    assert module.knowledge is None
    assert set(means(module, staged.batch())) == {"resp/3"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cascade": {"warmup": 0, "per_stage": 0, "joint": 0}}, "cascade has no epoch: set warmup, per_stage or joint"),
        ({"cascade": {"lower_lr": 0}}, "greater than 0"),
        ({"resp": {"rho": (0.5, 1.5)}}, r"rho lies in \[0, 1\]"),
        ({"resp": {"tau": (0, 1)}}, "tau above 0"),
        ({"refine": {"start_epoch": 3}}, "refine.start_epoch follows from cascade"),
        ({"harmonise": {"clip": (2, 1)}}, "clip is the lowest and the highest"),
        ({"harmonise": {"form": "gradnorm"}}, "'fd_ratio', 'uniform' or 'uncertainty'"),
        ({"fd": {"mean": 1}}, "Extra inputs"),
        ({"fd": {"form": "full", "teaches": False}}, "set teaches to true"),
        ({"substages": []}, "at least 1 item"),
        ({"student": {"name": "test_teacher_use:Colours"}, "substages": None}, "names no substages of its own"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        staged.recipe(**fields)


def test_an_unknown_student_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown student 'tiny'"):
        staged.recipe(student={"name": "tiny"}, substages=None)
