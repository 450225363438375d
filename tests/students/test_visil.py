"""Fine-grained similarity networks: golden values, padding, order of pairs, gradients."""

from __future__ import annotations

import hashed
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor

from vkd.errors import ConfigError
from vkd.losses.similarity import absolute, excess
from vkd.metrics.cost import num_parameters
from vkd.regions import collate, tiled
from vkd.similarity_layers import check_regions, pair_mask
from vkd.students.visil import FineStudent, Visil, VisilHead, load_reference, load_reference_head

ENCODERS = {"plain": {}, "attention": hashed.ATTENTION, "binary": {"binarization.W": (512, 512)}}
GOLDEN = {  # frame similarity [0, :3] and mean; s(q, t), s(t, q), s(q, t padded to 24 with a mask)
    "plain": ([0.05752737, 0.08059262, 0.05786598, 0.09993744], [0.15906223, 0.10977927, 0.12997743]),
    "attention": ([None, None, None, 0.02336027], [-0.00076804, 0.00336360, 0.00107716]),
    "binary": ([0.07378472, 0.07552083, 0.07074653, 0.10350457], [-0.03619377, -0.03213842, -0.03157121]),
}
KINDS = ["plain", "attention", "binary"]


def reference(kind: str) -> FineStudent:
    state = hashed.parameters(ENCODERS[kind] | hashed.comparator("visil_head."))
    return load_reference(state, kind=kind).eval()


def small(kind: str = "attention") -> FineStudent:
    torch.manual_seed(0)
    return FineStudent(kind, num_dims=16, num_bits=64, size="small").eval()


def videos(*lengths: int, num_dims: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [F.normalize(torch.randn(length, 9, num_dims, generator=generator), dim=-1) for length in lengths]


def padded(student: Visil, queries: list[Tensor], targets: list[Tensor]) -> Tensor:
    (q, q_mask), (t, t_mask) = collate(queries), collate(targets)
    return student.padded(student.index(q, q_mask), student.index(t, t_mask), q_mask, t_mask)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_golden_values(kind: str) -> None:
    student, q, t = reference(kind), hashed.query(), hashed.target()
    first, scores = GOLDEN[kind]
    query, target = student.index(q[None])[0], student.index(t[None])[0]
    if kind == "attention":
        assert query[0, 0, :3].tolist() == pytest.approx([-0.02776551, -0.01457482, 0.01944530], abs=1e-8)
    frames = student.frames(query[None], target[None])[0]
    found = [*frames[0, :3].tolist(), frames.mean().item()]
    assert [value for value, golden in zip(found, first, strict=True) if golden is not None] == pytest.approx(
        [golden for golden in first if golden is not None], abs=1e-8
    )
    longer, mask = collate([t, q])
    encoded = student.index(longer, mask)
    with_mask = student.padded(query[None], encoded[:1], torch.ones(1, 24, dtype=torch.bool), mask[:1])
    found = [student.exact(query, target).item(), student.exact(target, query).item(), with_mask.item()]
    assert found == pytest.approx(scores, abs=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "attention"])
def test_golden_scores_in_float32(kind: str) -> None:
    student = reference(kind).float()
    query, target = (student.index(x.float()[None])[0] for x in (hashed.query(), hashed.target()))
    assert student.exact(query, target).item() == pytest.approx(GOLDEN[kind][1][0], abs=2e-6)


@torch.no_grad()
@pytest.mark.parametrize(("symmetric", "golden"), [(False, [-0.07543223, -0.07650395]), (True, [-0.07538022, -0.07735789])])
def test_golden_values_of_the_teacher(symmetric: bool, golden: list[float]) -> None:
    state = hashed.parameters({"attention.context_vector.weight": (1, 512)} | hashed.comparator("video_comperator."))
    state["attention.context_vector.weight"] = F.normalize(state["attention.context_vector.weight"], dim=1)
    head = load_reference_head(state, num_dims=512, symmetric=symmetric)
    query, target = (head.index(x[None])[0] for x in (hashed.query(), hashed.target()))
    assert [head.exact(query, target).item(), head.exact(target, query).item()] == pytest.approx(golden, abs=1e-8)
    assert head.encode.weights(hashed.query())[0, 0].item() == pytest.approx(0.52572379, abs=1e-8)


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (lambda: FineStudent("attention"), 355_969),
        (lambda: FineStudent("binary"), 354_945),
        (lambda: FineStudent("plain"), 92_801),
        (lambda: VisilHead(3840), 96_641),
        (lambda: VisilHead(512, symmetric=True), 93_313),
    ],
)
def test_number_of_parameters(network: object, count: int) -> None:
    assert num_parameters(network()) == count  # type: ignore[operator]


@torch.no_grad()
def test_a_teacher_that_pads_zeros_begins_as_its_student() -> None:
    frames = torch.rand(1, 9, 13, generator=torch.Generator().manual_seed(3)) / 5
    student, teacher, bordered = (n.compare(frames).similarity for n in (FineStudent(), VisilHead(padding="zeros"), VisilHead()))
    torch.testing.assert_close(teacher, student)
    assert not torch.allclose(bordered, student, rtol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_query_major(kind: str) -> None:
    student, queries, targets = small(kind), videos(8, 12), videos(4, 8, 16)
    expected = [[student.exact(student.index(q[None])[0], student.index(t[None])[0]).item() for t in targets] for q in queries]
    torch.testing.assert_close(padded(student, queries, targets), torch.tensor(expected), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("length", "equal"), [(4, True), (5, False), (6, False), (7, False), (8, True), (9, False), (21, False)])
def test_padding_changes_scores_where_frames_remain(length: int, equal: bool) -> None:
    student = small("plain")
    query, target, longest = videos(length, length, 24)
    exact = student.exact(query, target)
    assert torch.allclose(padded(student, [query, longest], [target, longest])[0, 0], exact, atol=1e-6) == equal


@torch.no_grad()
def test_what_lies_in_the_padding_does_not_matter() -> None:
    student, (q, q_mask), (t, t_mask) = small(), collate(videos(6, 9)), collate(videos(5, 8))
    spoiled = t.masked_fill(~t_mask[:, :, None, None], 7.0)
    scores = [student.padded(student.index(q, q_mask), student.index(x, t_mask), q_mask, t_mask) for x in (t, spoiled)]
    assert torch.equal(*scores)


def test_an_empty_video_has_a_finite_score_and_gradient() -> None:
    student, (regions, mask) = small(), collate(videos(8, 8))
    mask[1] = False
    encoded = student.index(regions, mask)
    found = student.compare(student.frames(encoded, encoded), pair_mask(mask, mask))
    assert found.similarity[1] == 0
    found.similarity.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kind", ["attention", "binary"])
def test_gradient_of_the_losses_reaches_every_parameter(kind: str) -> None:
    student, (regions, mask) = small(kind).train(), collate(videos(8, 6, 9))
    student.comparator.fconv.bias.data.fill_(0.9)  # so that some cells are beyond 1
    encoded = student.index(regions, mask)
    found = student.compare(student.frames(encoded[:1], encoded), pair_mask(mask[:1], mask))
    ones = torch.ones(3)
    loss = absolute(found.similarity, torch.zeros(3), ones)[0] + excess(found.cells, found.mask, ones)[0]
    loss.backward()
    assert [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_gradients_equal_those_of_the_plain_form() -> None:
    """The einsum over all pairs of regions, masks as numbers, one pair at a time."""
    torch.manual_seed(1)
    student = FineStudent("attention", num_dims=16, size="small").double()
    (q, q_mask), (t, t_mask) = (collate([v.double() for v in videos(*lengths)]) for lengths in ((8, 6), (5, 9)))
    encoded_q, encoded_t = student.index(q, q_mask), student.index(t, t_mask)
    found = student.compare(student.frames(encoded_q, encoded_t), pair_mask(q_mask, t_mask))
    found.similarity.sum().backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    frames = torch.einsum("biok,bjpk->biopj", student.index(q, q_mask), student.index(t, t_mask)).max(3).values.mean(2)
    student.compare(frames, pair_mask(q_mask, t_mask)).similarity.sum().backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


@torch.no_grad()
def test_targets_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    student = small()
    query, target = (student.index(video[None])[0] for video in videos(8, 21))
    monkeypatch.setattr("vkd.students.visil.CHUNK_FRAMES", 9)
    parts = [student.exact(query, target[:9]), student.exact(query, target[9:18])]  # the last three frames are too few
    assert student.exact(query, target) == torch.stack(parts).mean()


def test_short_videos_must_be_repeated() -> None:
    student, (query, short) = small("plain"), videos(8, 3)
    with pytest.raises(ValueError, match="at least 4"):
        student.exact(query, short)
    assert student.exact(query, tiled(short)).isfinite()


def test_one_video_is_not_many() -> None:
    with pytest.raises(ValueError, match=r"of one video give regions\[None\]"):
        check_regions(torch.zeros(15, 9, 16), None)
    with pytest.raises(ValueError, match=r"with a mask \[15\]"):
        check_regions(torch.zeros(1, 15, 9, 16), torch.ones(15, dtype=torch.bool))
    with pytest.raises((ValueError, TypeCheckError)):
        small().index(torch.zeros(15, 9, 16))


def test_other_weights_and_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="FineStudent: weights of another network"):
        load_reference({"attention.context_vector.weight": torch.zeros(1, 512)}, kind="binary")
    with pytest.raises((ValueError, TypeCheckError)):
        FineStudent("attentive")
    with pytest.raises((ValueError, TypeCheckError)):
        FineStudent(size="huge")


def test_binary_codes() -> None:
    student = small("binary")
    codes = student.index(videos(5)[0][None])
    assert codes.shape == (1, 5, 9, 64)
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    hamming = (codes[0, :, None, :, None] != codes[0, None, :, None]).sum(-1)  # [5, 5, 9, 9]
    expected = (1 - 2 * hamming / 64).amax(3).mean(2)
    torch.testing.assert_close(student.frames(codes, codes)[0], expected)


@pytest.mark.parametrize("num_bits", [0, 12])
def test_codes_fill_bytes(num_bits: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        FineStudent("binary", 16, num_bits, "small")
