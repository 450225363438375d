"""Refining weak labels by what teacher and student say of the same rows. Pure arithmetic: float64 inside, float32 in a state.

A state has one row an example: `q0`, `q` and `p_s` [n, C], `omega`, `known`, `seen` and `epoch` [n, 1], and `logits` [n, C] when
labels are learned. `known` says that there is a weak label, `seen` that `p_s`, the student's running answer, is one; `epoch` is the
one at whose end the row was last refined, -1 before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field

Form = Literal["none", "closed", "learned", "net", "argmax"]
Probs = Float[np.ndarray, "n c"]
Column = Float[np.ndarray, "n 1"]
Rows = Bool[np.ndarray, "n 1"]
State = Mapping[str, np.ndarray]

ONE, SEVERAL = 0.9, 0.95  # mass of a weak label that names one class, or several
MIN_OMEGA, FLAT = 0.1, 1.5  # a label whose largest value is under FLAT / C is not used
COMPATIBILITY = 0.4  # of a learned label with the weak one
ROUNDING = 1e-9  # a uniform distribution has a confidence of 0, and not what rounding makes of it


class Refinement(BaseModel):
    """How and when labels are refined; the class prior of `align` is uniform.

    `closed` weighs weak label, teacher and student by confidence, `net` by what it learned on anchors; `learned` is after PENCIL (Yi &
    Wu 2019); `argmax`, a baseline, takes the teacher's first class. `step` is PENCIL's 600 over its batch of 128.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    form: Form = "closed"
    start_epoch: int = Field(default=0, ge=0)  # the first at whose end labels are refined
    refine_every: int = Field(default=1, ge=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    sharpen: float = Field(default=0.5, gt=0)
    trust: float = Field(default=0.5, ge=0)
    align: bool = True
    temperature: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.7, ge=0, lt=1)
    step: float = Field(default=600 / 128, gt=0)

    @property
    def aligns(self) -> bool:
        """Whether an update needs the mean of what all rows' generators say."""
        return self.align and self.form in ("closed", "net")

    def version(self, epoch: int) -> int:
        """The version of the labels that an epoch trains on; 0 is the weak labels."""
        if self.form == "none" or epoch <= self.start_epoch:
            return 0
        return 1 + (epoch - 1 - self.start_epoch) // self.refine_every

    def refined_after(self, version: int) -> int:
        """The epoch at whose end a version above 0 is made."""
        return self.start_epoch + (version - 1) * self.refine_every

    def listens(self, epoch: int) -> bool:
        """Whether a version needs what the student says in this epoch."""
        behind = epoch - self.start_epoch
        return self.form not in ("none", "argmax") and behind >= 0 and behind % self.refine_every == 0


class Evidence(NamedTuple):
    """What is said of some rows at the end of an epoch: by the student and by the teacher, NaN where nothing is, and their verified
    class, -1 where there is none."""

    epoch: int
    said: Probs
    taught: Probs
    anchor: Int[np.ndarray, " n"]


class Opinions(NamedTuple):
    """Weak label, teacher and student of each row, and how much each counts (u [n, 3]); `d` is how much the last two disagree.

    `seen` says where p_s is an answer of the student.
    """

    q0: Probs
    p_t: Probs
    p_s: Probs
    seen: Rows
    u: Float[np.ndarray, "n 3"]
    d: Column

    @property
    def features(self) -> Float[np.ndarray, "n f"]:
        """What a net sees: 3 C + 3 values."""
        return np.concatenate([self.q0, self.p_t, self.p_s, self.u], axis=1)


class Net(NamedTuple):
    """Weights of a two-layer perceptron from features to classes."""

    hidden: Float[np.ndarray, "f h"]
    hidden_bias: Float[np.ndarray, " h"]
    out: Float[np.ndarray, "h c"]
    out_bias: Float[np.ndarray, " c"]

    def __call__(self, features: Float[np.ndarray, "n f"]) -> Probs:
        return softmax(np.maximum(features @ self.hidden + self.hidden_bias, 0) @ self.out + self.out_bias)


def initial(labels: Sequence[Collection[int]], num_classes: int) -> tuple[Probs, Column]:
    """q0 and known of weak labels, each the classes that it names: uniform over them, and over the others; uniform without any."""
    q0, known = np.full((len(labels), num_classes), 1 / num_classes), np.zeros((len(labels), 1))
    for row, classes in enumerate(labels):
        known[row] = len(classes) > 0
        if 0 < len(classes) < num_classes:
            mass = ONE if len(classes) == 1 else SEVERAL
            q0[row] = (1 - mass) / (num_classes - len(classes))
            q0[row, list(classes)] = mass / len(classes)
    return q0, known


def first_state(q0: Probs, known: Column, form: Form) -> State:
    """The state of version 0: nothing is refined, and the student was not asked."""
    nothing = np.zeros_like(known)
    state = {"q0": q0, "q": q0, "p_s": np.full_like(q0, 1 / q0.shape[1]), "known": known, "seen": nothing}
    state |= {"omega": usage(q0, nothing), "epoch": nothing - 1} | ({"logits": np.log(q0)} if form == "learned" else {})
    return {name: np.asarray(value, np.float32) for name, value in state.items()}


def softmax(x: Float[np.ndarray, "n c"]) -> Probs:
    """Rows that sum to 1."""
    return normalised(np.exp(x - x.max(axis=1, keepdims=True)))


def normalised(x: Float[np.ndarray, "n c"]) -> Probs:
    """Rows over their sums, in double precision."""
    x = np.asarray(x, np.float64)
    rows: Probs = x / x.sum(axis=1, keepdims=True)
    return rows


def confidence(p: Probs) -> Column:
    """1 - entropy / log C: 0 for a uniform row, 1 for a certain one."""
    u = 1 - _entropy(p) / np.log(p.shape[1])
    return np.where(u > ROUNDING, u, 0.0)


def disagreement(p: Probs, q: Probs) -> Column:
    """Jensen-Shannon divergence over log 2, in [0, 1]."""
    divergence: Column = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    clipped: Column = (divergence / np.log(2)).clip(0, 1)
    return clipped


def generate(opinions: Opinions) -> Probs:
    """The mean of the three opinions, weighed by u; the weak label where all weights are 0."""
    u = np.where(opinions.u.sum(axis=1, keepdims=True) > 0, opinions.u, [[1.0, 0.0, 0.0]])
    return normalised(u[:, :1] * opinions.q0 + u[:, 1:2] * opinions.p_t + u[:, 2:] * opinions.p_s)


def align(g: Probs, mean: Float[np.ndarray, " c"]) -> Probs:
    """Rows times uniform prior / `mean`, the mean of g over all samples: classes that are said too often are said less."""
    return normalised(g / np.maximum(len(mean) * np.asarray(mean, np.float64), 1e-12))


def sharpen(g: Probs, temperature: float) -> Probs:
    """g ** (1 / temperature), normalised."""
    return normalised((g / g.max(axis=1, keepdims=True)) ** (1 / temperature))


def usage(q: Probs, d: Column) -> Column:
    """omega: how much a label counts; 0 when it hardly prefers any class."""
    largest = q.max(axis=1, keepdims=True)
    return np.where(largest < FLAT / q.shape[1], 0.0, np.clip(largest * (1 - d), MIN_OMEGA, 1))


def learned_logits(logits: Float[np.ndarray, "n c"], said: Probs, q0: Probs, step: float) -> Float[np.ndarray, "n c"]:
    """One step down PENCIL's loss KL(said || q) / C + 0.4 CE(q0, q), by its gradient in the logits of q."""
    q = softmax(logits)
    moved: Float[np.ndarray, "n c"] = logits - step * ((q - said) / q.shape[1] + COMPATIBILITY * (q - q0))
    return moved


def weigh(state: State, evidence: Evidence, config: Refinement) -> Opinions:
    """The three opinions once the student's answer of this epoch is in its running mean; what is not there counts 0."""
    q0, before = normalised(state["q0"]), normalised(state["p_s"])
    taught, asked, seen = _given(evidence.taught), _given(evidence.said), state["seen"] > 0
    p_t, said = _or_uniform(evidence.taught), _or_uniform(evidence.said)
    p_s = np.where(asked, np.where(seen, config.ema * before + (1 - config.ema) * said, said), before)
    seen = seen | asked
    d = np.where(taught & seen, disagreement(p_t, p_s), 0.0)
    u = [config.trust * state["known"], confidence(p_t) * taught * (1 - 0.5 * d), confidence(p_s) * seen * (1 - d)]
    return Opinions(q0, p_t, p_s, seen, np.concatenate(u, axis=1), d)


def proposed(opinions: Opinions, evidence: Evidence, net: Net | None) -> tuple[Probs, Rows]:
    """What the generator says of each row, and of which rows it has something to say that the weak label does not."""
    moves = opinions.u[:, 1:].sum(axis=1, keepdims=True) > 0
    if net is None:
        return generate(opinions), moves
    anchored = evidence.anchor[:, None] >= 0
    return np.where(anchored, _one_hot(evidence.anchor, opinions.q0), net(opinions.features)), moves | anchored


def refine(state: State, evidence: Evidence, mean: Float[np.ndarray, " c"] | None, config: Refinement, net: Net | None = None) -> State:
    """The state after one update; `mean` is that of `proposed` over all rows, None when the config does not align.

    Rows of this epoch's stamp or a later one stay as they are; so does the label of a row that the teacher has not labelled.
    """
    opinions = weigh(state, evidence, config)
    fresh = state["epoch"] < evidence.epoch
    taught = fresh & _given(evidence.taught)
    moves, d = taught, np.zeros_like(opinions.d)
    new = {"p_s": opinions.p_s, "seen": opinions.seen, "epoch": np.full_like(d, evidence.epoch)}
    if config.form == "learned":
        moves = taught & _given(evidence.said)
        new["logits"] = learned_logits(np.asarray(state["logits"], np.float64), _or_uniform(evidence.said), opinions.q0, config.step)
        q = softmax(new["logits"])
    elif config.form == "argmax":
        q = _one_hot(opinions.p_t.argmax(axis=1), opinions.p_t)
    else:
        g, told = proposed(opinions, evidence, net)
        moves, d = taught & told, opinions.d
        g = sharpen(g if mean is None else align(g, mean), config.sharpen)
        q = config.momentum * normalised(state["q"]) + (1 - config.momentum) * g
    new["q"] = np.where(moves, q, state["q"])
    new["omega"] = usage(new["q"], d)
    where = {"logits": moves, "omega": taught, "p_s": fresh & _given(evidence.said)}
    return dict(state) | {name: np.where(where.get(name, fresh), np.float32(value), state[name]) for name, value in new.items()}


def _given(p: Probs) -> Rows:
    given: Rows = ~np.isnan(p).any(axis=1, keepdims=True)
    return given


def _or_uniform(p: Probs) -> Probs:
    return normalised(np.where(_given(p), p, 1.0))


def _one_hot(classes: Int[np.ndarray, " n"], like: Probs) -> Probs:
    """Rows of zeros where the class is -1."""
    return np.asarray(classes[:, None] == np.arange(like.shape[1]), np.float64)


def _entropy(p: Probs) -> Column:
    """In nats."""
    entropy: Column = -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(axis=1, keepdims=True)
    return entropy
