"""Checkpoints and exports: safetensors and JSON, written whole, never pickled objects.

`<output>/attempts/<time-ordered id>/step-<n>/` holds one checkpoint; its `DONE` file comes last. Every start of training
is a new attempt that reads the newest DONE of any attempt and writes only into its own folder.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vkd import models
from vkd.errors import ConfigError, StorageError
from vkd.models import ModelSpec
from vkd.store import files
from vkd.students import STUDENTS
from vkd.students.base import SimilarityStudent, Student
from vkd.students.selector import Selector

FORMAT_VERSION = 1
MAX_HEAD = 1 << 20  # values of one head: a config may say anything
WEIGHTS, OPTIMIZER, STATE, DONE, CONFIG = "model.safetensors", "optimizer.pt", "state.json", "DONE", "config.json"
BEST = "best.safetensors"


@dataclass(frozen=True)
class Position:
    """The round to train, the optimizer steps and examples done so far, and how many batches of that round are among them.

    Batches are global, so a position is valid for any number of workers. Only a notice of preemption saves inside a round.
    """

    epoch: int = 0
    round: int = 0
    step: int = 0
    num_examples: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Best:
    """The weights with the lowest validation score of a phase."""

    phase: int
    score: float
    weights: Mapping[str, Tensor]


def new_attempt(output: str) -> str:
    """The folder of a new attempt; ids sort by time."""
    return files.join(output, "attempts", f"{time.time_ns():020d}-{uuid.uuid4().hex[:6]}")


def newest(output: str) -> str | None:
    """The finished checkpoint with the most steps, of any attempt; None before the first."""
    done = _finished(output)
    return done[-1] if done else None


def _finished(output: str) -> list[str]:
    """Finished checkpoints, oldest first."""
    root = files.join(output, "attempts")
    found = []
    for attempt in files.list_names(root):
        for name in files.list_names(files.join(root, attempt)):
            folder = files.join(root, attempt, name)
            if name.startswith("step-") and files.exists(files.join(folder, DONE)):
                found.append((int(name.removeprefix("step-")), attempt, folder))
    return [folder for _, _, folder in sorted(found)]


def snapshot(
    position: Position, distiller: nn.Module, optimizer: torch.optim.Optimizer, loss: float | None = None, best: Best | None = None
) -> dict[str, bytes]:
    """The files of a checkpoint, in the order in which they are written; training may go on meanwhile. `loss` is that of its round."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    state: dict[str, Any] = {"format_version": FORMAT_VERSION, "position": asdict(position), "loss": loss}
    contents = {WEIGHTS: _weights(distiller), OPTIMIZER: buffer.getvalue()}
    if best is not None:
        state["best"] = {"phase": best.phase, "score": best.score}
        contents[BEST] = _packed(best.weights)
    return contents | {STATE: json.dumps(state).encode(), DONE: b""}


def save(attempt: str, step: int, contents: Mapping[str, bytes]) -> None:
    """Write a snapshot; it counts once DONE is there."""
    for name, data in contents.items():
        files.put(files.join(attempt, f"step-{step:09d}", name), data)


class Saver:
    """Saves checkpoints while training goes on, one at a time; what went wrong is raised by the next call."""

    def __init__(self) -> None:
        self._pool, self._saving = ThreadPoolExecutor(1), Future[None]()
        self._saving.set_result(None)

    def submit(self, save: Callable[[], None]) -> None:
        """Run `save` beside training, once the one before it has ended."""
        self.flush()
        self._saving = self._pool.submit(save)

    def flush(self) -> None:
        """Wait until everything is saved."""
        self._saving.result()

    def close(self) -> None:
        """End after what is being saved."""
        self._pool.shutdown()


def position(folder: str) -> Position:
    """Where a finished checkpoint stands."""
    with _whole(STATE, folder):
        return Position(**json.loads(files.read(files.join(folder, STATE)))["position"])


def restore(folder: str, distiller: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Load a finished checkpoint into both; the position to go on from."""
    load_weights(distiller, folder)
    with _whole(OPTIMIZER, folder):
        optimizer.load_state_dict(torch.load(io.BytesIO(files.read(files.join(folder, OPTIMIZER))), weights_only=True))
    return position(folder)


def best_of_phase(folder: str) -> Best | None:
    """The best weights that a finished checkpoint has of its phase; None when it has none."""
    with _whole(STATE, folder):
        told = json.loads(files.read(files.join(folder, STATE))).get("best")
    if told is None:
        return None
    with _whole(BEST, folder):
        return Best(told["phase"], told["score"], safetensors.torch.load(files.read(files.join(folder, BEST))))


def best(output: str) -> str | None:
    """The finished checkpoint after the round with the lowest loss, the newest of equals; None before the first."""
    losses = {folder: _loss(folder) for folder in _finished(output)}
    return min(reversed(losses), key=lambda folder: losses[folder], default=None)


def _loss(folder: str) -> float:
    with suppress(FileNotFoundError, ValueError, AttributeError, TypeError):  # a damaged one is not the best
        loss = json.loads(files.read(files.join(folder, STATE))).get("loss")
        return math.inf if loss is None else float(loss)
    return math.inf


def prune(output: str, keep: int) -> None:
    """Delete all finished checkpoints but the newest `keep` and the best."""
    kept = best(output)
    for folder in _finished(output)[:-keep]:
        if folder == kept:
            continue
        files.delete(files.join(folder, DONE))  # first, so that no half-deleted checkpoint is ever read
        files.delete(folder)


def export(student: nn.Module, spec: ModelSpec, folder: str, extra: dict[str, Any]) -> None:
    """Write a student that `load_student` or `load_similarity` loads back, without Ray; `extra` is recorded beside it."""
    config: dict[str, Any] = {"format_version": FORMAT_VERSION, "student": spec.model_dump()}
    if isinstance(student, Student):
        config["heads"] = {name: head.out_features for name, head in student.heads.items()}
        config["sampling"] = student.sampling.model_dump(mode="json")
    config |= extra
    files.put(files.join(folder, WEIGHTS), _weights(student))
    files.put(files.join(folder, CONFIG), json.dumps(config, indent=1).encode())


def load_student(folder: str) -> Student:
    """An exported student of frames in eval mode, on the CPU. Raises ConfigError when the folder holds none."""
    config, spec = read_export(folder)
    _require_kind(spec, (Student,), folder, "export the student again")
    heads = config.get("heads")
    if not isinstance(heads, dict) or not all(isinstance(size, int) and 0 < size <= MAX_HEAD for size in heads.values()):
        raise ConfigError(f"no heads: {str(heads)[:100]}", where=folder, action="export the student again")
    student: Student = models.build(spec, STUDENTS, "student", heads=heads)
    load_weights(student, folder)
    return student.eval()


def load_similarity(folder: str) -> SimilarityStudent | Selector:
    """An exported student of region features in eval mode, on the CPU. Raises ConfigError when the folder holds none."""
    _, spec = read_export(folder)
    _require_kind(spec, (SimilarityStudent, Selector), folder, "name the folder of one that learned similarity of videos")
    student: SimilarityStudent | Selector = models.build(spec, STUDENTS, "student")
    load_weights(student, folder)
    return student.eval()


def read_export(folder: str) -> tuple[dict[str, Any], ModelSpec]:
    """What an export folder tells of its student, and which model it is. Raises ConfigError when there is none."""
    try:
        with _whole(CONFIG, folder):
            config = json.loads(files.read(files.join(folder, CONFIG)))
            return config, ModelSpec.model_validate(config["student"])
    except FileNotFoundError as error:
        raise ConfigError("holds no exported student", where=folder, action="vkd distill RUN, then name its student folder") from error


def _require_kind(spec: ModelSpec, kinds: tuple[type, ...], folder: str, action: str) -> None:
    """Raises ConfigError for another model: a config may name anything that can be imported."""
    found = models.find(spec, STUDENTS, "student")
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise ConfigError(f"{spec.name!r} is no such student", where=folder, action=action)


def _weights(module: nn.Module) -> bytes:
    return _packed(module.state_dict())


def _packed(weights: Mapping[str, Tensor]) -> bytes:
    data: bytes = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    return data


def load_weights(module: nn.Module, folder: str) -> None:
    """Load those of a checkpoint or an export. Raises ConfigError when they are of another model, StorageError when damaged."""
    with _whole(WEIGHTS, folder):
        weights = safetensors.torch.load(files.read(files.join(folder, WEIGHTS)))
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights do not fit the model: {str(error).splitlines()[-1].strip()}",
            where=folder,
            action="use the recipe that made them, or another output",
        ) from error


@contextmanager
def _whole(name: str, folder: str) -> Iterator[None]:
    """Turn what reading a damaged file raises into a StorageError that names it."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError, MemoryError) as error:
        first_line, _, _ = str(error).partition("\n")
        what = f"{name} is damaged: {first_line}"
        raise StorageError(what, where=folder, action="delete this folder, then run the same command again") from error
