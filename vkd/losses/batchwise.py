"""Losses that are one number for the whole batch: the rows of all ranks are gathered, and each rank owns its share of the value.

`all_rows` gives the rows of all ranks from this rank's, in one call per loss, and its gradient is the sum of what all ranks
say of a row. Only rows of weight > 0 are used, each once, whatever its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from vkd.losses.distillation import SumAndCount, kept

MIN_ROWS = 8  # of all ranks together: statistics of fewer say more of the draw than of the model

AllRows = Callable[[Tensor], Tensor]


def own_rows(rows: Tensor) -> Tensor:
    """The rows themselves: what `all_rows` is where one rank has the whole batch."""
    return rows


def gathered(parts: Sequence[Float[Tensor, "b ..."]], weight: Float[Tensor, " b"], all_rows: AllRows) -> list[Float[Tensor, "n ..."]]:
    """The n rows of weight > 0 of all ranks, of each part, in float32 or better; one call of `all_rows` for all parts."""
    if all_rows is own_rows and bool((weight > 0).all()):
        return [precise(part) for part in parts]  # nothing to bring together or to leave out
    flat = [precise(kept(part, weight)).flatten(1) for part in parts]
    every = all_rows(torch.cat([*flat, (weight > 0)[:, None]], dim=1))
    *columns, is_present = every.tensor_split(list(accumulate(part.shape[1] for part in flat)), dim=1)
    rows = is_present[:, 0] > 0
    return [column[rows].reshape(int(rows.sum()), *part.shape[1:]) for column, part in zip(columns, parts, strict=True)]


def precise(x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """The same in float32 at least: Gram matrices, distances and exponentials are too much for half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product(a: Float[Tensor, "*k n d"], b: Float[Tensor, "*k d m"]) -> Float[Tensor, "*k n m"]:
    """a @ b in the precision that they have, under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def whole_batch(value: Float[Tensor, ""], weight: Float[Tensor, " b"]) -> SumAndCount:
    """This rank's share of a value that all ranks computed from all rows: shares and counts add up to `value` as the mean."""
    count = weight.sum()
    return value * count, count


def skipped(*parts: Float[Tensor, "n ..."]) -> SumAndCount:
    """A loss that this batch does not have: 0 with a gradient of 0 for all that it is of, and a count of 0."""
    return torch.stack([rows[:0].sum() for rows in parts]).sum(), parts[0].new_zeros(())


def over_batch(
    value: Callable[..., Float[Tensor, ""]],
    parts: Sequence[Float[Tensor, "b ..."]],
    weight: Float[Tensor, " b"],
    all_rows: AllRows,
    min_rows: int = 1,
) -> SumAndCount:
    """This rank's share of value(*parts) on the rows of all ranks; skipped when they are fewer than `min_rows`."""
    rows = gathered(parts, weight, all_rows)
    return whole_batch(value(*rows), weight) if len(rows[0]) >= min_rows else skipped(*rows)
