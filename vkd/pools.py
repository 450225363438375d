"""Work handed to a pool of threads or processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from typing import TypeVar

Progress = Callable[[int, int], None]  # how many are done, and of how many
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in(pool: Executor, function: Callable[[Item], Result], items: Sequence[Item], progress: Progress | None = None) -> list[Result]:
    """`function` of each item, in order; the first error cancels what has not begun. `progress` runs in the caller; the pool is shut."""
    try:
        futures = [pool.submit(function, item) for item in items]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if progress is not None:
                progress(done, len(items))
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
