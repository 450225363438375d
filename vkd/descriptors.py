"""What is kept of a network's stage maps: moments over space-time and a coarse profile over time, in few dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vkd.clips import uniform_numbers
from vkd.errors import ConfigError
from vkd.schema import TensorType
from vkd.stage_maps import KEY

VERSION = 1  # raised whenever the arithmetic changes: descriptors of two versions cannot be compared
NUM_STEPS = 4
NUM_ROWS = 2 + NUM_STEPS
NUM_PROJECTED = 128
EPSILON = 1e-5

Form = Literal["proj128", "full"]
FORMS: tuple[Form, ...] = ("proj128", "full")
Substages = bool | Sequence[str]  # of a teacher's options: none, the model's own, or these


class Descriptor(nn.Module):
    """Of one stage's map: its mean, sqrt(biased variance + 1e-5), and its spatial mean pooled to 4 steps of time; fp32 always.

    `full` keeps a column for each channel; `proj128` multiplies by `projection(stage, num_channels)`. Teachers and students
    are described alike.
    """

    matrix: Tensor | None

    def __init__(self, num_channels: int, stage: int = 0, form: Form = "full") -> None:
        super().__init__()
        self.num_dims = num_channels if form == "full" else NUM_PROJECTED
        matrix = None if form == "full" else torch.from_numpy(projection(stage, num_channels))
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, stage_map: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 6 d"]:
        with torch.autocast(stage_map.device.type, enabled=False):
            x = stage_map.float()
            over_space = x.mean(dim=(3, 4))
            mean = over_space.mean(dim=2)
            # half the time of torch.var_mean on a CPU, and as exact
            variance = (x - mean[:, :, None, None, None]).square().mean(dim=(2, 3, 4))
            steps = F.adaptive_avg_pool1d(over_space, NUM_STEPS).transpose(1, 2)
            rows = torch.cat([torch.stack([mean, (variance + EPSILON).sqrt()], dim=1), steps], dim=1)
            return rows if self.matrix is None else rows @ self.matrix


def projection(stage: int, num_channels: int) -> Float[np.ndarray, "c 128"]:
    """A fixed matrix with orthonormal columns, another for each stage; up to 128 channels the identity, with columns of zeros."""
    if num_channels <= NUM_PROJECTED:
        return np.eye(num_channels, NUM_PROJECTED, dtype=np.float32)
    numbers = uniform_numbers(f"projection/{VERSION}/{stage}", num_channels * NUM_PROJECTED)
    columns, triangle = np.linalg.qr(2 * numbers.reshape(num_channels, NUM_PROJECTED) - 1)
    signed: np.ndarray = columns * np.sign(np.diag(triangle))  # the signs that QR gives are a library's choice
    return signed.astype(np.float32)


class StageLabels(nn.Module):
    """The labels `stage1`, `stage2`, ... of a teacher: the descriptors of its parts `names`, which have so many channels."""

    def __init__(self, names: Sequence[str], num_channels: Sequence[int], form: Form) -> None:
        super().__init__()
        self.names, self.form = tuple(names), form
        parts = [Descriptor(num, stage, form) for stage, num in enumerate(num_channels)]
        self.descriptors, self.num_dims = nn.ModuleList(parts), [part.num_dims for part in parts]
        self.eval()

    @property
    def emits(self) -> dict[str, TensorType]:
        return {name: TensorType("float32", (NUM_ROWS, num)) for name, num in zip(self._labels, self.num_dims, strict=True)}

    def identity(self) -> dict[str, Any]:
        """What decides them; nothing without names, so that label sets from before there were any stay valid."""
        return {KEY: list(self.names), "descriptors": self.form, "descriptors_version": VERSION} if self.names else {}

    def forward(self, maps: Sequence[Float[Tensor, "b _ _ _ _"]]) -> dict[str, Float[Tensor, "b 6 _"]]:
        described = (descriptor(x) for descriptor, x in zip(self.descriptors, maps, strict=True))
        return dict(zip(self._labels, described, strict=True))

    @property
    def _labels(self) -> list[str]:
        return [f"stage{number}" for number in range(1, len(self.names) + 1)]


def check_options(substages: Substages, form: str) -> None:
    """Raises ValueError when a teacher's options `substages` and `descriptors` cannot be used."""
    if isinstance(substages, str) or not (isinstance(substages, bool) or all(isinstance(name, str) for name in substages)):
        raise ValueError(f"{KEY} is {substages!r}; it can be true, false or a list of names")
    if form not in FORMS:
        raise ValueError(f"descriptors is {form!r}; it can be {', '.join(FORMS)}")
    if form != FORMS[0] and not substages:
        raise ValueError(f"descriptors is {form!r}, but nothing is described without {KEY}: set it to true, or name them")


def chosen(substages: Substages, own: Sequence[str]) -> tuple[str, ...]:
    """The names that the option asks for, of a model that has its `own`. Raises ConfigError when it has none to offer."""
    if substages is True and not own:
        raise ConfigError("the model names no substages of its own", where=KEY, action="list the names of its parts")
    return tuple(own) if substages is True else tuple(substages or ())
