"""Labelling beside training: one actor runs the labelling and holds the window between both; it ends when nothing lacks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vkd import checkpoint, cluster, labelling
from vkd import run as run_files
from vkd.errors import LabellingEnded, VkdError
from vkd.label_report import LabelReport
from vkd.run import Run
from vkd.window import POLL_S, Key, Taken, Window

MAX_RESTARTS = 3
NUM_THREADS = 32  # questions that the actor answers at a time, beside the labelling
TELL_S, ENDED_S = 1.0, 10.0


@dataclass(frozen=True)
class RemoteLink:
    """The window of a labelling actor, as any process reaches it."""

    actor: ActorHandle

    def take(self, key: Key) -> tuple[Taken, bytes | None]:
        """What the window says of a chunk, and its bytes when it has them."""
        try:
            taken: Taken = ray.get(self.actor.take.remote(key))
        except RayActorError:
            return Taken(False, (), True), None
        for held in taken.held:
            with suppress(RayError):  # the store has them too
                return taken, ray.get(held)
        return taken, None

    def commit(self, key: Key, round_number: int, data: bytes) -> None:
        """Tell the window of a committed chunk, with its bytes; they go when this process ends."""
        self.actor.commit.remote(key, round_number, [ray.put(data)], len(data))

    def wait_for_turn(self, round_number: int) -> None:
        """Wait until labelling may begin a chunk of this round."""
        while not ray.get(self.actor.may_start.remote(round_number)):
            time.sleep(POLL_S)

    def trained(self, round_number: int) -> None:
        """Tell that a round is trained."""
        self.actor.trained.remote(round_number)


class _Labeller:
    """What runs in the actor. When it dies, Ray starts it again and calls `label` again, which goes on where the store ends."""

    def __init__(self, tree: Mapping[str, Any], start: tuple[int, int]) -> None:
        self.run, self.start, self.report = run_files.parse(dict(tree)), start, LabelReport()
        lead = self.run.labels.lead_rounds if self.run.labels.mode == "live" else None
        self.window = Window(self.run.labels.window_bytes, lead)

    def label(self) -> LabelReport:
        """Label what training lacks."""
        cluster.quieten()
        link = RemoteLink(ray.get_runtime_context().current_actor)
        newest = checkpoint.newest(self.run.output)
        if newest is not None:  # training may have got on since the driver started
            position = checkpoint.position(newest)
            self.start = max(self.start, (position.epoch, position.round))
        try:
            return labelling.label_for_training(self.run, self.start, link, self._note)
        finally:
            self.window.ended = True

    def _note(self, report: LabelReport) -> None:
        self.report = report

    def progress(self) -> tuple[LabelReport, int, int]:
        """How far labelling is, the most bytes that the window ever held, and the bytes that it handed over."""
        return self.report, self.window.peak_bytes, self.window.handed_over_bytes

    def take(self, key: Key) -> Taken:
        return self.window.take(key)

    def commit(self, key: Key, round_number: int, held: list[Any], num_bytes: int) -> None:
        self.window.commit(key, round_number, held, num_bytes)

    def may_start(self, round_number: int) -> bool:
        return self.window.may_start(round_number)

    def trained(self, round_number: int) -> None:
        self.window.trained(round_number)


class Beside:
    """A labelling that runs; `report` is the newest that it told."""

    def __init__(self, run: Run, start: tuple[int, int], progress: Callable[[LabelReport], None]) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        kind = ray.remote(_Labeller).options(
            num_cpus=0, max_concurrency=NUM_THREADS, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS, scheduling_strategy=here
        )
        self.actor = kind.remote(run.model_dump(mode="json"), start)
        self.link, self.progress, self.report = RemoteLink(self.actor), progress, LabelReport()
        self.peak_window_bytes = self.handed_over_bytes = self.spilled_bytes = 0
        self.num_cores = 0.0  # the most that there ever were: nodes come and go
        self._labelled = self.actor.label.remote()
        self._ended = threading.Event()
        self._teller = threading.Thread(target=self._tell, daemon=True)
        self._teller.start()

    def finish(self) -> None:
        """Wait for the rest of the labels. Raises what the labelling raised."""
        ray.get(self._labelled)
        self._stop_telling()
        self._look()
        self.spilled_bytes = cluster.spilled_bytes()

    def raise_its_error(self, timeout_s: float) -> None:
        """Raise what ended the labelling, if something does in this time: it is the cause of what training says then."""
        with suppress(GetTimeoutError):
            ray.get(self._labelled, timeout=timeout_s)

    def close(self) -> None:
        """End it, finished or not; what is committed is kept."""
        self._stop_telling()
        ray.kill(self.actor)

    def _stop_telling(self) -> None:
        self._ended.set()
        self._teller.join(ENDED_S)

    def _tell(self) -> None:
        while not self._ended.wait(TELL_S):
            with suppress(RayError):
                self._look()

    def _look(self) -> None:
        before = self.report
        self.num_cores = max(self.num_cores, ray.cluster_resources().get("CPU", 0.0))
        self.report, self.peak_window_bytes, self.handed_over_bytes = ray.get(self.actor.progress.remote())
        if self.report.done > before.done:
            self.progress(self.report)
        cluster.export_metrics({"handed_over_bytes": self.handed_over_bytes})


@contextmanager
def labelling_beside(run: Run, start: tuple[int, int], progress: Callable[[LabelReport], None]) -> Iterator[Beside | None]:
    """A labelling that runs while the body trains from `start` (epoch, round), and has labelled all when it is left.

    None, and no Ray, when the run reads stored labels or the store lacks nothing.
    """
    always = run.labels.mode == "live" and start[0] < run.train.epochs  # what training reads goes again
    if run.labels.mode == "stored" or not (always or labelling.lacks_for_training(run, start)):
        yield None
        return
    with cluster.session(run.compute), cluster.worker_errors():
        beside = Beside(run, start, progress)
        try:
            yield beside
            beside.finish()
        except LabellingEnded:
            beside.raise_its_error(ENDED_S)  # training hears of the end before the error is there
            raise
        except (VkdError, RayError, TrainingFailedError):
            beside.raise_its_error(0)
            raise
        finally:
            beside.close()
