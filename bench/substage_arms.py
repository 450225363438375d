"""What the benchmarks of the recipe `substage` share: arms with ingredients switched off, and a watcher that says nothing."""

from __future__ import annotations

from typing import Any


def off(epochs: int) -> dict[str, Any]:
    """One phase that supervises the last exit alone: plain distillation."""
    return {
        "combos": {"prefix": False, "pair": False, "fused": False},
        "fd": {"moments": 0, "mmd": 0, "temporal": 0},
        "rel": {"sp": 0, "corr": 0, "pair": 0},
        "cascade": {"warmup": 0, "per_stage": 0, "joint": epochs},
    }


def plain(epochs: int, rho: float) -> dict[str, Any]:
    """Cross entropy on the labels as they are given, and the teacher's answer with a share of rho."""
    return off(epochs) | {"refine": {"form": "none"}} | response(rho)


def response(rho: float) -> dict[str, Any]:
    """One share of the teacher's answer, and one temperature, for all exits."""
    return {"resp": {"rho": [rho, rho], "tau": [4, 4]}}


class Silent:
    """Who is told of progress."""

    def stage(self, name: str) -> None: ...
    def copied(self, done: int, total: int) -> None: ...
    def probed(self, done: int, total: int) -> None: ...
    def labelled(self, report: object) -> None: ...
    def trained(self, report: object) -> None: ...
