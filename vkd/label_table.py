"""The table of refined labels: versions of it, and what the student said, as label sets whose view is the version or the epoch.

    <folder>/refined-<fingerprint>/view=<version>/<shard>/chunk-00042.a0.parquet
    <folder>/said-<fingerprint>/view=<epoch>/<shard>/chunk-00042.a0.parquet

A chunk of a version is a pure function of the version before, of what the student said and of the teacher's labels; so it does not
matter who makes it, how often, or in which order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from torch import Tensor

from vkd import gather, planning, refinement, refinement_net, schema
from vkd.clips import assign_splits
from vkd.errors import ConfigError, LabelsMismatch, LabelsMissing
from vkd.feeding import BEAT_S, Labels
from vkd.planning import Plan
from vkd.refinement import Evidence, Net, Refinement, State
from vkd.rounds import Chunk, Round
from vkd.schema import TensorType
from vkd.store.encodings import decode
from vkd.store.labelset import ChunkRows, LabelSet, LabelSetSpec, Reject

TRAINED = ("q", "omega")  # what training reads
REFINED, SAID, LOGITS, PROBS = "refined", "said", "logits", "probs"
TRUTH, ANCHOR = "truth", "anchor"  # columns of the manifest: the true class, to report by, and a verified class, to learn by
NOT_ASKED = Reject("train", "not_asked", "the student was not asked", False)

MapChunks = Callable[[Callable[[Chunk], Any], Sequence[Chunk]], Iterable[Any]]


def weak_sets(examples: pa.Table, classes: Sequence[str]) -> list[set[int]]:
    """The classes that the label of each example names; none without a label."""
    number = {name: i for i, name in enumerate(classes)}
    labels = examples[schema.LABEL].to_pylist() if schema.LABEL in examples.column_names else [None] * examples.num_rows
    return [{number[name] for name in planning.named(label) if name in number} for label in labels]


@dataclass(frozen=True)
class Version:
    """One version of the table, read as labels are, whatever the view: each row's label `q`, and how much it counts, `omega`."""

    label_set: LabelSet
    number: int

    @property
    def spec(self) -> LabelSetSpec:
        spec = self.label_set.spec
        return replace(spec, tensors={name: spec.tensors[name] for name in TRAINED}, encodings=dict.fromkeys(TRAINED, "fp32"))

    def read(self, view: int, chunk: Chunk, columns: Sequence[str] | None = None) -> pa.Table:
        """The chunk's rows in this version."""
        return self.label_set.read(self.number, chunk, columns or TRAINED)


class LabelTable:
    """Weak labels that are refined while training goes on. Every rank has one, and rank 0 writes.

    `taught` has the teacher's logits of the plan's chunks. `map_chunks` does the work of many chunks, in any order; the function that
    it is given may be sent to other processes. Raises ConfigError when the labels' classes are not the teacher's.
    """

    def __init__(self, folder: str, plan: Plan, taught: Labels, num_views: int, config: Refinement, map_chunks: MapChunks = map) -> None:
        self.plan, self.config, self.map_chunks = plan, config, map_chunks
        classes, num_classes = plan.classes(), taught.spec.tensors[LOGITS].num_values
        if num_classes < 2 or (classes and len(classes) != num_classes):
            what = f"the labels name {len(classes)} classes, and the teacher's {LOGITS} have {num_classes}"
            raise ConfigError(what, where=plan.manifest_path, action="choose a teacher of these classes, or mend the labels")
        rows, cell = TensorType("float32", (num_classes,)), TensorType("float32", (1,))
        tensors = dict.fromkeys(["q", "q0", "p_s", *([LOGITS] if config.form == "learned" else [])], rows)
        tensors |= dict.fromkeys(["omega", "known", "seen", "epoch"], cell)
        fields = {"refinement": config.model_dump(), "taught": taught.spec.name, "num_views": num_views, "classes": classes}
        fields |= {"split": plan.split.model_dump()}
        refined = _created(folder, LabelSetSpec(REFINED, fields, tensors, dict.fromkeys(tensors, "fp32")))
        said = _created(folder, LabelSetSpec(SAID, {"of": refined.spec.name}, {PROBS: rows}, {PROBS: "fp32"}))
        self.sets = _Sets(plan, tuple(classes), refined, said, taught, num_views, config)

    def note(self, round_: Round, examples: Int[Tensor, " n"], probs: Float[Tensor, "n c"]) -> None:
        """Keep what the student said of the examples of a round: those of this rank, by their numbers in the plan, -1 for none.

        Every rank must call it, before the round's checkpoint. Said twice, the first counts. Raises ConfigError when it is not finite.
        """
        if not self.config.listens(round_.epoch):
            return
        numbers = gather.rows_over_ranks(examples.detach()).cpu().numpy()
        said = gather.rows_over_ranks(probs.detach().float()).cpu().numpy()
        if not np.isfinite(said[numbers >= 0]).all():
            raise ConfigError("the student's answers are not finite", where=f"epoch {round_.epoch}", action="lower train.learning_rate")
        if gather.world()[0] == 0:
            for position in round_.chunks:
                mine = numbers // self.plan.chunk_size == position
                self.sets.hear(round_.epoch, self.plan.chunks[position], numbers[mine] % self.plan.chunk_size, said[mine])

    def prepare(self, epoch: int, beat: Callable[[], None] = lambda: None) -> int:
        """The version that an epoch trains on, complete. Every rank must call it: rank 0 makes what lacks, the others wait.

        All of them `beat` meanwhile: the teacher's labels may still be made, for longer than ranks wait for each other at once.
        Raises LabelsMissing when the student was not heard in an epoch that a version needs.
        """
        version, pool = self.config.version(epoch), ThreadPoolExecutor(1)
        making = pool.submit(self._complete, version) if gather.world()[0] == 0 else None
        pool.shutdown(wait=False)  # who interrupts this does not wait for it
        while gather.of_rank_0(_unfinished(making)):
            beat()
        if making is not None:
            making.result()
        return version

    def at(self, version: int) -> Version:
        """A version that was prepared, for a feeder, under the alias "refined"."""
        return Version(self.sets.refined, version)

    def accuracy(self, version: int) -> float | None:
        """The share of train rows of known truth whose label prefers it; None without such rows."""
        counts = self._counts(version)
        return counts.right / counts.known if counts.known else None

    def share_unused(self, version: int) -> float:
        """The share of train rows whose label is not used, omega 0."""
        counts = self._counts(version)
        return counts.unused / max(counts.rows, 1)

    def _counts(self, version: int) -> _Counts:
        parts = list(self.map_chunks(partial(self.sets.counts, version), self.plan.chunks))
        return _Counts(*(sum(column) for column in zip(*parts, strict=True)))

    def _complete(self, version: int) -> None:
        """Make what lacks of a version, after what lacks of those before."""
        first = version
        while first > 0 and self._lacking(first):
            first -= 1
        for number in range(first, version + 1):
            lacking = self._lacking(number)
            if lacking and number == 0:
                list(self.map_chunks(self.sets.start, lacking))
            elif lacking:
                self._check_heard(number)
                net = self._net(number) if self.config.form == "net" else None
                mean = self._mean(number, net) if self.config.aligns else None
                list(self.map_chunks(partial(self.sets.update, number, net, mean), lacking))

    def _lacking(self, version: int) -> list[Chunk]:
        return self.sets.refined.missing(version, self.plan.chunks)

    def _check_heard(self, version: int) -> None:
        """What no note was taken of is no reason to wait: an update must not go on without it."""
        epoch = self.config.refined_after(version)
        trained = [chunk for chunk in self.plan.chunks if self.config.listens(epoch) and self.sets.train_rows(chunk).any()]
        lacking = self.sets.said.missing(epoch, trained)
        if lacking:
            what = f"what the student said in epoch {epoch} is missing for {len(lacking)} of {len(trained)} chunks"
            raise LabelsMissing(what, where=self.sets.said.uri, action="train from the start, into another output")

    def _mean(self, version: int, net: Net | None) -> Float[np.ndarray, " c"]:
        """The mean of what the generator says over all train rows, rounded the same in any order of chunks."""
        parts = list(self.map_chunks(partial(self.sets.proposed, version, net), self.plan.chunks))
        num_rows: int = sum(count for _, count in parts)
        return np.array([math.fsum(column) / max(num_rows, 1) for column in np.stack([total for total, _ in parts]).T])

    def _net(self, version: int) -> Net:
        parts = sorted(self.map_chunks(partial(self.sets.anchored, version), self.plan.chunks), key=lambda part: part[0])
        features, classes = (np.concatenate(columns) for columns in list(zip(*parts, strict=True))[1:])
        if not len(classes):
            action = f"name the verified class of some videos in the manifest's column {ANCHOR!r}, or choose another form"
            raise ConfigError("no example to train on has a verified class", where="recipe.refine.form", action=action)
        return refinement_net.fit(features, classes, self.sets.num_classes)


class _Counts(NamedTuple):
    rows: int
    unused: int
    known: int
    right: int


@dataclass(frozen=True)
class _Sets:
    """What the work on one chunk reads and writes; may be sent to other processes."""

    plan: Plan
    classes: tuple[str, ...]
    refined: LabelSet
    said: LabelSet
    taught: Labels
    num_views: int
    config: Refinement

    @property
    def num_classes(self) -> int:
        return self.taught.spec.tensors[LOGITS].num_values

    def start(self, chunk: Chunk) -> None:
        """Commit a chunk of version 0: the weak labels."""
        q0, known = refinement.initial(weak_sets(self.plan.examples(chunk), self.classes), self.num_classes)
        self._commit(0, chunk, refinement.first_state(q0, known, self.config.form))

    def update(self, version: int, net: Net | None, mean: Float[np.ndarray, " c"] | None, chunk: Chunk) -> None:
        """Commit a chunk of a version above 0."""
        state, evidence = self._inputs(version, chunk)
        self._commit(version, chunk, refinement.refine(state, evidence, mean, self.config, net))

    def proposed(self, version: int, net: Net | None, chunk: Chunk) -> tuple[Float[np.ndarray, " c"], int]:
        """Sum over the chunk's train rows that the teacher has labelled of what the generator says, and their number."""
        state, evidence = self._inputs(version, chunk)
        g, _ = refinement.proposed(refinement.weigh(state, evidence, self.config), evidence, net)
        rows = self.train_rows(chunk) & ~np.isnan(evidence.taught).any(axis=1)
        return g[rows].sum(axis=0), int(rows.sum())

    def anchored(self, version: int, chunk: Chunk) -> tuple[Chunk, Float[np.ndarray, "n f"], Int[np.ndarray, " n"]]:
        """The chunk, with features and verified class of its train rows that have one."""
        state, evidence = self._inputs(version, chunk)
        rows = self.train_rows(chunk) & (evidence.anchor >= 0)
        return chunk, refinement.weigh(state, evidence, self.config).features[rows], evidence.anchor[rows]

    def counts(self, version: int, chunk: Chunk) -> _Counts:
        """Counts over the chunk's train rows."""
        state, truth, train = self._state(version, chunk), self._column(chunk, TRUTH), self.train_rows(chunk)
        right = train & (truth >= 0) & (state["q"].argmax(axis=1) == truth)
        unused = train & (state["omega"][:, 0] == 0)
        return _Counts(int(train.sum()), int(unused.sum()), int((train & (truth >= 0)).sum()), int(right.sum()))

    def hear(self, epoch: int, chunk: Chunk, rows: Int[np.ndarray, " n"], probs: Float[np.ndarray, "n c"]) -> None:
        """Commit what the student said of some rows of a chunk."""
        ids = self.plan.examples(chunk)[schema.EXAMPLE_ID].to_pylist()
        said = np.zeros((len(ids), self.num_classes), np.float32)
        said[rows] = probs
        rejects = dict.fromkeys(set(range(len(ids))) - set(rows.tolist()), NOT_ASKED)
        self.said.write(epoch, chunk, ChunkRows(ids, rejects, {PROBS: said}))

    def train_rows(self, chunk: Chunk) -> np.ndarray:
        """Which rows of a chunk are trained on."""
        return np.array([split == schema.TRAIN for split in assign_splits(self.plan.examples(chunk), self.plan.split)], bool)

    def _inputs(self, version: int, chunk: Chunk) -> tuple[State, Evidence]:
        epoch, num_rows = self.config.refined_after(version), self.plan.examples(chunk).num_rows
        said = np.full((num_rows, self.num_classes), np.nan)
        if self.config.listens(epoch) and self.train_rows(chunk).any():
            said = self._values(self.said, epoch, chunk, PROBS)
        logits = [self._values(self.taught, view, chunk, LOGITS) / self.config.temperature for view in range(self.num_views)]
        return self._state(version - 1, chunk), Evidence(epoch, said, _mean_over_views(logits), self._column(chunk, ANCHOR))

    def _state(self, version: int, chunk: Chunk) -> State:
        table = self._read(self.refined, version, chunk, list(self.refined.spec.tensors))
        return {name: np.asarray(decode(table, name)) for name in self.refined.spec.tensors}

    def _values(self, label_set: Labels, view: int, chunk: Chunk, name: str) -> Float[np.ndarray, "n c"]:
        """A label in double precision, NaN in the rows that have none."""
        table = self._read(label_set, view, chunk, [name])
        labelled = np.array(table[schema.STATUS].to_pylist()) == schema.LABELLED
        return np.where(labelled[:, None], np.asarray(decode(table, name), np.float64), np.nan)

    def _read(self, label_set: Labels, view: int, chunk: Chunk, columns: Sequence[str]) -> pa.Table:
        table = label_set.read(view, chunk, columns)
        if table[schema.EXAMPLE_ID].to_pylist() != self.plan.examples(chunk)[schema.EXAMPLE_ID].to_pylist():
            what = f"chunk {chunk.index} of shard {chunk.shard}, view {view} is of other examples than the plan's"
            raise LabelsMismatch(what, where=label_set.spec.name, action="use another output")
        return table

    def _column(self, chunk: Chunk, name: str) -> Int[np.ndarray, " n"]:
        """The class that a column of the manifest names, -1 where it names none."""
        examples = self.plan.examples(chunk)
        named = examples[name] if name in examples.column_names else pa.nulls(examples.num_rows)
        return planning.label_numbers(pa.table({schema.LABEL: named}), self.classes)

    def _commit(self, version: int, chunk: Chunk, state: State) -> None:
        ids = self.plan.examples(chunk)[schema.EXAMPLE_ID].to_pylist()
        self.refined.write(version, chunk, ChunkRows(ids, {}, dict(state)))


def _unfinished(making: Future[None] | None) -> str | None:
    """What rank 0 says after some waiting, None once it is done; other ranks have nothing to say."""
    return "working" if making is not None and not wait([making], BEAT_S).done else None


def _mean_over_views(logits: Sequence[Float[np.ndarray, "n c"]]) -> Float[np.ndarray, "n c"]:
    """Probabilities, averaged over the views that have a row; NaN in rows that none has."""
    given = np.stack([~np.isnan(view).any(axis=1) for view in logits])
    probs = np.stack([refinement.softmax(np.where(there[:, None], view, 0)) for view, there in zip(logits, given, strict=True)])
    counts = given.sum(axis=0)[:, None]
    total = (probs * given[:, :, None]).sum(axis=0)
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)


def _created(folder: str, spec: LabelSetSpec) -> LabelSet:
    return LabelSet.create(folder, spec, {}, {}, {})
