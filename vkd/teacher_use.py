"""Is the teacher really used? Before training, every N steps and at the end, some batches are looked at; training is not changed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vkd import gather
from vkd.feeding import Fed
from vkd.label_table import REFINED
from vkd.loop import Loop
from vkd.metrics import teacher_use
from vkd.metrics.teacher_use import Control, Finding, Spans
from vkd.recipes.base import Batch, Losses
from vkd.run import Run
from vkd.store import files

FILE = "teacher_use.json"  # in the run's output
LOGITS = "logits"
ROWS_OF_CHECK, MIN_LOOKS, MAX_LOOKS = 128, 8, 16  # a check looks at as many batches in a row as hold these clips
ROWS_OF_COLUMNS = 1024  # label columns are read at every step until then
MIN_STEPS, MIN_SHARE = 100, 0.2  # steps, and share of the schedule, before a student must know something
HEADS, STAGE = "heads.", ".stage"


@dataclass
class _Check:
    """Batches looked at since step `start`: each loss with the labels and with shuffled ones, and sums of the agreement."""

    start: int
    num_looks: int = 0
    num_rows: int = 0  # moved by shuffling
    pairs: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    depends: set[str] = field(default_factory=set)
    agreement: dict[str, np.ndarray] = field(default_factory=dict)  # sums with labels, with shuffled ones, rows

    def controls(self) -> dict[str, Control]:
        found = {}
        for name, pairs in self.pairs.items():
            labels, shuffled = np.mean(pairs, axis=0).tolist()
            differences = [other - loss for loss, other in pairs]
            margin = teacher_use.margin(differences) if len(pairs) >= teacher_use.MIN_DIFFERENCES else None
            if math.isfinite(labels) and math.isfinite(shuffled):
                found[name] = Control(labels, shuffled, margin, name in self.depends)
        return found


class TeacherUse:
    """A loop's watcher, called on every rank before each step: all ranks look at the same steps and compute in the same order.

    Figures are over the rows of all ranks, but for columns: those of this rank, in the first epoch that it sees.
    """

    def __init__(self, loop: Loop, needs: Sequence[str]) -> None:
        self.loop, self.needs, self.every_steps = loop, needs, loop.train.check_every_steps
        self.num_looks = min(MAX_LOOKS, max(MIN_LOOKS, -(-ROWS_OF_CHECK // loop.train.batch_size)))
        self.columns: dict[str, Spans] = {}
        self.shares: dict[str, float] = {}
        self.max_shares: dict[str, float] = {}
        self.controls: dict[str, Control] = {}
        self.agreement: dict[str, tuple[float, float]] = {}
        self.leaks: list[Finding] = []
        self.step, self._epoch, self._trained, self.judged = -1, -1, False, False
        self._check: _Check | None = None
        self._told: set[tuple[str, str]] = set()

    def __call__(self, fed: Fed, step: int, total: int) -> None:
        """Look at the batch of this step, of `total`, if it is time to."""
        if not self.every_steps:
            return
        first = self.step < 0
        self._epoch = fed.round.epoch if first else self._epoch
        if self._check is None and (first or step % self.every_steps == 0 or step == total - self.num_looks):
            self._check = _Check(step)
        self.step, check = step, self._check
        if check is not None:
            self._look(check, fed.batch)
            check.num_looks += 1
            if check.num_looks == self.num_looks or step == total - 1:
                self._close(check, total)
        if self._read_columns(fed) or check is not None:
            self._tell()

    def findings(self) -> list[Finding]:
        """What is wrong, as far as it is known by now."""
        drowned = teacher_use.drowned_losses(self.max_shares, self.loop.distiller.regularisers)
        found = [*teacher_use.wrong_columns(self.columns), *drowned, *self.leaks]
        if self._trained:  # before its first step a student may answer zeros, of which some losses are the same for all labels
            found += teacher_use.ignored_labels(self.controls, self.needs)
        paired = {name: each for name, each in self.controls.items() if name.partition("/")[0] not in self.loop.distiller.unpaired}
        return found + (list(teacher_use.unused_labels(paired)) if self.judged else [])

    def metrics(self) -> dict[str, float]:
        """Flat numbers, for TensorBoard."""
        found = {f"gradient_share/{name}": share for name, share in self.shares.items()}
        for name, control in self.controls.items():
            found |= {f"loss_with_labels/{name}": control.labels, f"loss_with_shuffled_labels/{name}": control.shuffled}
        for name, (labels, shuffled) in self.agreement.items():
            found |= {f"agreement/{name}": labels, f"agreement_with_shuffled_labels/{name}": shuffled}
        found |= {f"constant_dimensions/{name}": spans.figures()["constant"] for name, spans in self.columns.items()}
        return {f"teacher_use/{name}": value for name, value in found.items()}

    def document(self) -> dict[str, Any]:
        """All figures and findings, as JSON. `judged` when the student was trained long enough to be compared with shuffled labels."""
        return {
            "step": self.step,
            "judged": self.judged,
            "columns": {name: spans.figures() for name, spans in self.columns.items()},
            "losses": {name: asdict(control) for name, control in self.controls.items()},
            "gradient_share": self.shares,
            "max_gradient_share": self.max_shares,
            "agreement": {name: {"labels": a, "shuffled": b} for name, (a, b) in self.agreement.items()},
            "findings": [asdict(finding) for finding in self.findings()],
        }

    def save(self, output: str) -> None:
        """Put the document into a run's output; nothing when nothing is checked."""
        if self.every_steps:
            files.put(files.join(output, FILE), json.dumps(self.document(), indent=1).encode())

    def recall(self, document: Mapping[str, Any]) -> None:
        """Go on from what an earlier attempt found that cannot be found later."""
        self.max_shares = dict(document["max_gradient_share"])
        self.leaks = [Finding(**found) for found in document["findings"] if found["kind"] == "leak"]

    def _read_columns(self, fed: Fed) -> bool:
        """Note the labels of this rank's rows; of one epoch only, since later ones bring the same clips."""
        if fed.round.epoch != self._epoch or any(spans.num_rows >= ROWS_OF_COLUMNS for spans in self.columns.values()):
            return False
        kept = fed.batch["weight"] > 0
        for name in _label_columns(fed.batch):
            # refined labels may all count alike, and descriptors of few channels are padded with zeros
            if fed.batch[name].is_floating_point() and not (name.startswith(f"{REFINED}.") or STAGE in name):
                self.columns.setdefault(name, Spans()).add(fed.batch[name][kept])
        return True

    def _look(self, check: _Check, fed: Batch) -> None:
        """One batch: losses with labels, with shuffled labels and, the first time, with noise; gradients the first time."""
        batch = {name: tensor.to(self.loop.device, non_blocking=True) for name, tensor in fed.items()}
        rng = np.random.default_rng([self.loop.train.seed, self.step, gather.world()[0]])
        shuffled, first, distiller = _shuffled(batch, rng), not check.pairs, self.loop.distiller
        with _unchanged(distiller, self.loop.device):
            with self.loop.autocast:
                with torch.set_grad_enabled(first), _outputs(distiller.student) as outputs:
                    losses = distiller(batch)
                with torch.no_grad():
                    others = [distiller(shuffled)] + ([distiller(_noise(batch, rng))] if first else [])
            sums, counts = _over_ranks([losses, *others])
            if first:
                self._weigh_gradients(losses, counts[0])
        means = (sums / counts).tolist()
        for i, name in enumerate(sorted(losses)):
            check.pairs.setdefault(name, []).append((means[0][i], means[1][i]))
            if any(teacher_use.changed(means[0][i], other[i]) for other in means[1:]):
                check.depends.add(name)
        _add_agreement(check, outputs, batch, shuffled)
        check.num_rows += int(gather.sum_over_ranks(_moved(batch)))
        if self.step == 0 and check.num_rows >= teacher_use.ROWS_OF_LEAK:
            self.leaks = list(teacher_use.leaking_losses(check.controls()))

    def _weigh_gradients(self, losses: Losses, counts: Tensor) -> None:
        """Norm of each loss's gradient in the student's trunk, of those that reach it in this phase; the heads are each loss's own."""
        trunk = [p for name, p in self.loop.distiller.student.named_parameters() if p.requires_grad and not name.startswith(HEADS)]
        names, norms = list[str](), list[Tensor]()
        for name, count in zip(sorted(losses), counts, strict=True):
            term = losses[name][0] / count
            reached = torch.autograd.grad(term, trunk, retain_graph=True, allow_unused=True) if trunk and term.requires_grad else ()
            squares = [grad.float().square().sum() for grad in reached if grad is not None]
            if squares:
                names.append(name)
                norms.append(torch.stack(squares).sum().sqrt())
        summed = gather.sum_over_ranks(torch.stack(norms)).tolist() if norms else []
        self.shares = teacher_use.gradient_shares(dict(zip(names, summed, strict=True)))
        for kind, share in teacher_use.by_kind(self.shares).items():
            self.max_shares[kind] = max(share, self.max_shares.get(kind, 0.0))

    def _close(self, check: _Check, total: int) -> None:
        train = self.loop.train
        self.controls, self._check = check.controls(), None
        self.agreement = {name: (a / n, b / n) for name, (a, b, n) in ((k, v.tolist()) for k, v in check.agreement.items()) if n}
        self._trained = check.start > 0
        enough = check.start >= max(MIN_STEPS, MIN_SHARE * total, train.warmup_fraction * total)
        self.judged = enough and check.num_rows >= teacher_use.ROWS_OF_COLUMN

    def _tell(self) -> None:
        """Say each new finding once, on rank 0."""
        for finding in self.findings():
            if (finding.kind, finding.where) not in self._told and gather.world()[0] == 0:
                print(f"warning: {finding}", file=sys.stderr, flush=True)
            self._told.add((finding.kind, finding.where))


def watched(loop: Loop, run: Run, step: int) -> TeacherUse:
    """Watches the loop, on every rank: what it finds needs all of them. After a resume at `step` it knows what was found before."""
    use = TeacherUse(loop, run.recipe.needs)
    if step and (found := load(run.output)):
        use.recall(found)
    loop.watch = use
    return use


def load(output: str) -> dict[str, Any] | None:
    """The document in a run's output; None when there is none."""
    try:
        return files.read_json(files.join(output, FILE), ("step", "judged", "max_gradient_share", "findings"))
    except FileNotFoundError:
        return None


def _label_columns(batch: Batch) -> list[str]:
    return sorted(name for name in batch if "." in name)


def _moved(batch: Batch) -> Tensor:
    """How many of this rank's rows a shuffling moves."""
    return F.threshold((batch["weight"] > 0).sum(), 1, 0)


def _shuffled(batch: Batch, rng: np.random.Generator) -> Batch:
    """The batch with the labels of other clips: a clip's labels stay together, masked rows stay where they are."""
    kept = torch.nonzero(batch["weight"] > 0).flatten()
    order = torch.arange(len(batch["weight"]), device=kept.device)
    order[kept] = kept[torch.from_numpy(teacher_use.derangement(len(kept), rng)).to(kept.device)]
    return batch | {name: batch[name][order] for name in _label_columns(batch)}


def _noise(batch: Batch, rng: np.random.Generator) -> Batch:
    """The batch with random numbers for labels: a loss that does not change never looks at them."""
    floats = [name for name in _label_columns(batch) if batch[name].is_floating_point()]
    return batch | {name: torch.from_numpy(3 * rng.standard_normal(batch[name].shape)).to(batch[name]) for name in floats}


def _over_ranks(found: Sequence[Losses]) -> tuple[Tensor, Tensor]:
    """Sums and counts over all ranks, [number of forwards, number of losses], losses by name."""
    names = sorted(found[0])
    local = torch.stack(
        [torch.stack([torch.stack([part.detach().float() for part in losses[name]]) for name in names]) for losses in found]
    )
    sums, counts = gather.sum_over_ranks(local).unbind(dim=2)
    return sums, counts.clamp_min(1.0)


def _add_agreement(check: _Check, outputs: Mapping[str, Tensor], batch: Batch, shuffled: Batch) -> None:
    """Same top class for logits, cosine for the rest; where the student answers under the label's name."""
    kept = (batch["weight"] > 0).float()
    for column in _label_columns(batch):
        answered, label = outputs.get(column.partition(".")[2]), column.rpartition(".")[2]
        if answered is None or answered.ndim != 2 or answered.shape != batch[column].shape:
            continue
        sums = []
        for taught in (batch[column], shuffled[column]):
            same = (
                answered.argmax(dim=1) == taught.argmax(dim=1) if label == LOGITS else F.cosine_similarity(answered.float(), taught.float())
            )
            sums.append((same.float() * kept).sum())
        summed = gather.sum_over_ranks(torch.stack([*sums, kept.sum()])).double().cpu().numpy()
        check.agreement[column] = check.agreement.get(column, np.zeros(3)) + summed


@contextmanager
def _outputs(student: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What the student answers when it is first asked inside; empty when that is no mapping."""
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if not seen and isinstance(output, Mapping):
            seen.update({name: tensor.detach() for name, tensor in output.items() if isinstance(tensor, Tensor)})

    handle = student.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _unchanged(module: nn.Module, device: str) -> Iterator[None]:
    """In eval mode; afterwards modes, buffers and streams of random numbers are what they were."""
    modes = [(each, each.training) for each in module.modules()]
    buffers = [(each, name, kept, kept.clone()) for each, _ in modes for name, kept in each.named_buffers(recurse=False)]
    with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
        module.eval()
        try:
            yield
        finally:
            for each, training in modes:
                each.training = training
            with torch.no_grad():
                for each, name, kept, before in buffers:
                    setattr(each, name, kept.copy_(before))
