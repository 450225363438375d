"""Decoding in a child process: a video that hangs, crashes or fills the memory ends that child only, and is rejected.

One guard belongs to one thread. Frames come through shared memory, several clips a call; what is said beside them is JSON.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from vkd.clips import Clip
from vkd.errors import StorageError, VideoError, VkdError
from vkd.store import files
from vkd.video.container import VideoInfo
from vkd.video.fetch import FORBIDDEN
from vkd.video.process import ChildEnded, Process
from vkd.video.settings import MAX_DEADLINE_S, NUM_SLOTS, Settings, Views

CHILD = "vkd.video.child"
MAX_CLIPS = 1000  # of one child: decoders leak
MAX_REQUEST_CLIPS = 64  # sent at once
MAX_STARTS = 3
MAX_AGAIN = 2  # more tries when a child ended that the video may not have harmed


class Guard:
    """One child, started when it is needed. `cpu_s` is what its children spent; `attempts` how often the last clip was tried."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cpu_s, self.attempts = 0.0, 0
        self._child: Process | None = None

    def decode(self, clips: Sequence[Clip]) -> Iterator[Views | VideoError]:
        """Frames of each clip, in order, or why it cannot be used. Raises StorageError when storage stays away, or refuses all videos.

        A clip that ends the child is tried once more, by PyAV when the decoder may be chosen; both within its deadline.
        """
        refused: set[str] = set()
        for clip, answer in zip(clips, self._each(clips), strict=True):
            if isinstance(answer, VideoError) and answer.kind == FORBIDDEN:
                refused.add(clip.uri)
            yield answer
        if len(refused) > 1 and refused == {clip.uri for clip in clips}:
            action = "check the credentials and what they permit, then run the same command again"
            raise StorageError(f"access denied to all {len(refused)} videos of a chunk", where=clips[0].uri, action=action)

    def _each(self, clips: Sequence[Clip]) -> Iterator[Views | VideoError]:
        done = 0
        while done < len(clips):
            self.attempts = 1
            try:
                for answer in self._answers(clips[done : done + MAX_REQUEST_CLIPS], self.settings.backend):
                    yield answer
                    done += 1
            except ChildEnded as ended:
                yield self._again(clips[done], ended)
                done += 1
            except StorageError as error:
                yield self._when_storage_answers(clips[done], error)
                done += 1

    def probe(self, uri: str, full: bool = False) -> VideoInfo:
        """What the header of a video says; `full` decodes all of it. Raises VideoError, StorageError when storage stays away."""
        op, deadline_s = ("probe_full", MAX_DEADLINE_S) if full else ("probe", self.settings.limits.deadline_s)

        def once() -> VideoInfo:
            with self._request({"op": op, "uri": uri}) as child:
                told = self._told(child.answer(deadline_s, uri), uri)
                try:
                    return VideoInfo(**told["info"])
                except (KeyError, TypeError) as error:
                    raise ChildEnded("crash", "the decoder's process answered what is no answer", where=uri) from error

        for _ in range(MAX_AGAIN):
            try:
                return files.patiently(once, uri)
            except ChildEnded as ended:
                if ended.alone and ended.kind != "killed":
                    raise
        return files.patiently(once, uri)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __del__(self) -> None:
        self.close()

    def _answers(self, clips: Sequence[Clip], backend: str) -> Iterator[Views | VideoError]:
        with self._request({"op": "decode", "backend": backend, "clips": [asdict(clip) for clip in clips]}) as child:
            for number, clip in enumerate(clips):
                # a first try leaves half of the time to the second
                answer = child.answer(self.settings.limits.of(clip) / self.settings.num_tries, clip.uri)
                try:
                    self._told(answer, clip.uri)
                    views: Views | VideoError = [view.copy() for view in self.settings.views_of(child.memory, number % NUM_SLOTS)]
                except VideoError as error:
                    views = error.with_traceback(None)  # which would hold this child's memory as long as the error
                child.say({"taken": number})
                yield views

    def _again(self, clip: Clip, ended: ChildEnded) -> Views | VideoError:
        """More tries: by PyAV when the decoder may be chosen, as before when the video may not be what ended the child."""
        if ended.kind == "killed":
            backends = [self.settings.backend] * MAX_AGAIN
        elif self.settings.backend == "auto":
            backends = ["pyav"]
        else:
            backends = [] if ended.alone or ended.kind == "deadline" else [self.settings.backend]
        for backend in backends:
            self.attempts += 1
            try:
                return files.patiently(partial(self._answer, clip, backend), clip.uri)
            except ChildEnded as error:
                ended = error
        return ended.with_traceback(None)

    def _when_storage_answers(self, clip: Clip, error: StorageError) -> Views | VideoError:
        try:
            return files.patiently(partial(self._answer, clip, self.settings.backend), clip.uri, error)
        except ChildEnded as ended:
            return self._again(clip, ended)

    def _answer(self, clip: Clip, backend: str) -> Views | VideoError:
        (answer,) = self._answers([clip], backend)
        return answer

    @contextmanager
    def _request(self, message: Mapping[str, Any]) -> Iterator[Process]:
        """A child at work on a request; one that was left in the middle of it is of no more use."""
        if self._child is not None and (self._child.num_answers > MAX_CLIPS or not self._child.alive):
            self.close()
        self._child = child = self._child or _started(self.settings)
        try:
            child.say(message)
            yield child
        except BaseException as error:
            if not isinstance(error, VideoError) or isinstance(error, ChildEnded):
                self.close()
            raise

    def _told(self, answer: dict[str, Any], uri: str) -> dict[str, Any]:
        """The answer of a request that went well. Raises what the child says went wrong."""
        self.cpu_s += answer.get("cpu_s", 0.0)
        if "storage" in answer:
            raise StorageError(answer["storage"], where=uri, action=answer["action"], passing=answer["passing"])
        if "kind" in answer:
            raise VideoError(answer["kind"], answer["what"], where=uri, permanent=answer["permanent"])
        return answer


def _started(settings: Settings) -> Process:
    """A child that is ready. Raises VkdError when none starts: that is no video's fault."""
    for _ in range(MAX_STARTS):
        try:
            return Process(settings, CHILD)
        except ChildEnded as error:
            why = error.what
    raise VkdError(f"the decoder's process does not start: {why}", where="compute.decode", action="mend the installation, or report this")


_HERE = threading.local()


def here(settings: Settings) -> Guard:
    """The guard of this thread: the same one for the same settings. It ends with its thread."""
    guard: Guard | None = getattr(_HERE, "guard", None)
    if guard is None or guard.settings != settings:
        if guard is not None:
            guard.close()
        _HERE.guard = guard = Guard(settings)
    return guard
