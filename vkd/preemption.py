"""Nodes that are about to be taken away: training saves inside a round before they go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress

import ray
from ray.exceptions import RayError

from vkd import gather

LOOK_S = 2.0
SAVE_EVERY_S = 20.0  # a notice is about two minutes: what is trained until the end is worth saving too


def nodes_of_ranks() -> set[str]:
    """Ids of the nodes on which the ranks run; none without Ray. Every rank must call it."""
    here = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return set(gather.of_all(here)) - {""}


class Notice:
    """Says, at most every `save_every_s`, that one of these nodes is being drained; it looks beside training."""

    def __init__(self, nodes: Collection[str], draining: Callable[[], Collection[str]] | None = None, save_every_s: float = SAVE_EVERY_S):
        self.nodes, self.draining, self.save_every_s = set(nodes), draining or _draining, save_every_s
        self._told, self._ended, self._told_s = threading.Event(), threading.Event(), float("-inf")
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self.nodes:
            self._watcher.start()

    def __call__(self) -> bool:
        """Whether to save now."""
        if not self._told.is_set() or time.monotonic() - self._told_s < self.save_every_s:
            return False
        self._told_s = time.monotonic()
        return True

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        if self.nodes:
            self._watcher.join(LOOK_S)

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            with suppress(RayError, RuntimeError, OSError):  # a head that does not answer says nothing of nodes
                if self.nodes & set(self.draining()):
                    self._told.set()
                else:
                    self._told.clear()


def _draining() -> Collection[str]:
    nodes: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return nodes
