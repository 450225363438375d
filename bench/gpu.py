"""What vkd adds to a GPU's work: a teacher's adapter and the train loop against bare networks on tensors that are there already.

    python bench/gpu.py --json    gate: teacher_ratio >= 0.95 and train_ratio >= 0.95 (medians, bf16)

teacher_ratio  clips/s of the EfficientNet-Lite adapter, uint8 frames in host memory in and labels in host memory out, over clips/s of
               its network's forward pass on preprocessed tensors of the same clips on the device, in the same sub-batches
train_ratio    examples/s of vkd's Loop, fed with batches that threads copy and pin as the feeder's do, over examples/s of the bare
               step on the same batches on the device
The arms of a ratio take turns; the spread is over pairs, the first of which only warms up. Weights are random: they decide no
speed. Without a GPU there is nothing to measure: it says so and exits with 0. `--device cpu` only shows that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from measure import arguments, finish, spread

from vkd import gather
from vkd.checkpoint import Position
from vkd.clips import Sampling
from vkd.efficientnet import VARIANTS, EfficientNetLite, preprocess
from vkd.feeding import NUM_THREADS, READ_AHEAD_BATCHES, Fed, Feeder
from vkd.loop import Loop
from vkd.models import ModelSpec
from vkd.recipes.base import Batch
from vkd.recipes.kd import KD
from vkd.rounds import Round
from vkd.run import Train
from vkd.schema import FRAMES, TensorType
from vkd.students.base import Student
from vkd.teachers.efficientnet_lite import EfficientNetLiteTeacher
from vkd.transfer import pinned

GATE = 0.95
NUM_LOGITS, NUM_DIMS = 1000, 1280


def main() -> None:
    teacher = {"clips": 64, "teacher_batch": 8, "calls": 10}
    train = {"student": "small", "train_batch": 256, "batches": 8, "epochs": 5}
    options = arguments(__doc__ or "", repeats=5, device="", **teacher, **train)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "")
    if not options.device:
        finish({"skipped": "needs a GPU, and PyTorch sees none"}, options.json)
        return
    result = {**measure_teacher(options), **measure_train(options), "torch": str(torch.__version__), "device": options.device}
    if options.device == "cuda":
        passed = min(result["teacher_ratio"], result["train_ratio"]) >= GATE
        result |= {"device": torch.cuda.get_device_name(), "gate": GATE, "gate_passed": passed}
    finish(result, options.json)


def measure_teacher(options: argparse.Namespace) -> dict[str, Any]:
    """The adapter over a chunk's frames, and its network over the same frames on the device."""
    teacher = random_teacher(options.device, options.teacher_batch)
    sampling = cast(Sampling, teacher.sampling)
    shape = (options.clips, sampling.num_frames, sampling.size_px, sampling.size_px, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    parts = [torch.from_numpy(frames[i : i + options.teacher_batch]) for i in range(0, options.clips, options.teacher_batch)]
    resident = [preprocess(part.to(options.device).flatten(0, 1)) for part in parts]

    def adapter() -> None:
        for _ in range(options.calls):
            teacher({FRAMES: frames})

    @torch.inference_mode()
    def bare() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            for images in resident * options.calls:
                teacher.module(images)

    return _compared("teacher", "clips_per_s", (bare, adapter), options.clips * options.calls, options)


def measure_train(options: argparse.Namespace) -> dict[str, Any]:
    """The loop from host memory, and its step on the device."""
    ours, theirs = (_loop(options) for _ in range(2))
    batches = [_batch(ours, options.train_batch, seed) for seed in range(options.batches)]
    resident: list[Batch] = [{name: tensor.to(options.device) for name, tensor in batch.items()} for batch in batches]
    num_examples = options.train_batch * options.batches

    def fed() -> None:
        feeder = cast(Feeder, InMemory(batches))
        ours.fit(feeder, num_examples, Position(), lambda report, position: None)

    def bare() -> None:
        theirs.distiller.train()
        for batch in resident * options.epochs:
            _bare_step(theirs, batch)

    return _compared("train", "examples_per_s", (bare, fed), num_examples * options.epochs, options)


class InMemory:
    """What the loop asks of a feeder, from batches in host memory, one a chunk; threads copy and pin them ahead, as Feeder's do."""

    rank, unreadable, left_out = 0, 0, 0

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.wait_s = batches, 0.0
        self.sizes = [len(batch["weight"]) for batch in batches]

    def stream(self, rounds: Sequence[Round], batch_size: int, seed: int, skip: int = 0) -> Iterator[Fed]:
        """A batch a chunk, in the order of the rounds."""
        pending: deque[tuple[Round, int, bool, Future[Batch]]] = deque()
        with ThreadPoolExecutor(NUM_THREADS) as makers:
            for round_ in rounds:
                for chunk in round_.chunks:
                    made = makers.submit(_copied, self.batches[chunk])
                    pending.append((round_, self.sizes[chunk], chunk == round_.chunks[-1], made))
                    if len(pending) == READ_AHEAD_BATCHES:
                        yield self._next(pending)
            while pending:
                yield self._next(pending)

    def _next(self, pending: deque[tuple[Round, int, bool, Future[Batch]]]) -> Fed:
        round_, num_examples, last, made = pending.popleft()
        started_s = time.monotonic()
        batch = made.result()
        self.wait_s += time.monotonic() - started_s
        return Fed(round_, batch, num_examples, last)


def random_teacher(device: str, batch_size: int) -> EfficientNetLiteTeacher:
    """An EfficientNet-Lite0 with random weights, in bf16: the packages with the trained ones need not be installed."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "random.pth")
        torch.manual_seed(0)
        torch.save(EfficientNetLite(VARIANTS[0]).state_dict(), weights)
        teacher = EfficientNetLiteTeacher(0, batch_size=batch_size, precision="bf16", weights=str(weights))
        teacher.load(device)
    return teacher


def _loop(options: argparse.Namespace) -> Loop:
    student = ModelSpec(name="shift_cnn", options={"size": options.student})
    recipe = KD(name="kd", teacher=ModelSpec(name="efficientnet_lite"), student=student)
    emits = {"teacher": {"logits": TensorType("float32", (NUM_LOGITS,)), "embedding": TensorType("float32", (NUM_DIMS,))}}
    torch.manual_seed(0)
    train = Train(epochs=options.epochs, batch_size=options.train_batch, precision="bf16")
    return Loop(recipe.distiller(emits, 0), train, options.device)


def _batch(loop: Loop, num_rows: int, seed: int) -> Batch:
    """Noise in the form of a batch of the feeder."""
    generator = torch.Generator().manual_seed(seed)
    sampling = cast(Student, loop.distiller.student).sampling
    shape = (num_rows, sampling.num_frames, sampling.size_px, sampling.size_px, 3)
    return {
        FRAMES: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "teacher.logits": torch.randn(num_rows, NUM_LOGITS, generator=generator),
        "teacher.embedding": torch.randn(num_rows, NUM_DIMS, generator=generator),
        "label": torch.full((num_rows,), -1),
        "weight": torch.ones(num_rows),
    }


def _copied(batch: Batch) -> Batch:
    return {name: pinned(tensor.clone()) for name, tensor in batch.items()}


def _bare_step(loop: Loop, batch: Batch) -> None:
    loop.optimizer.zero_grad(set_to_none=True)
    with loop.autocast:
        losses = loop.distiller(batch)
    loss, _ = gather.total_loss(losses)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(loop.distiller.parameters(), loop.train.clip_norm)
    loop.optimizer.step()


def _compared(
    what: str, unit: str, arms: tuple[Callable[[], None], Callable[[], None]], count: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Speeds of the bare arm and of ours, and their ratio."""
    pairs = [[_per_s(arm, count, options.device) for arm in arms] for _ in range(options.repeats + 1)][1:]
    ratios = [ours / bare for bare, ours in pairs]
    return {
        f"{what}_bare_{unit}": statistics.median(bare for bare, _ in pairs),
        f"{what}_{unit}": statistics.median(ours for _, ours in pairs),
        f"{what}_ratio_spread": spread(ratios),
        f"{what}_ratio": statistics.median(ratios),
    }


def _per_s(work: Callable[[], None], count: int, device: str) -> float:
    _wait(device)
    started_s = time.monotonic()
    work()
    _wait(device)
    return count / (time.monotonic() - started_s)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
