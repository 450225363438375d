"""The DnS selector: which pairs the coarse score gets wrong, so that the fine one must be computed (Kordopatis-Zilos et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vkd.layers import BatchNorm
from vkd.similarity_layers import Attention, Comparator, check_regions, load_renamed, pair_mask


class Size(NamedTuple):
    """Channels of the comparator, width of the pair network."""

    channels: tuple[int, int, int]
    num_hidden: int


SIZES = {"small": Size((8, 16, 32), 16), "paper": Size((32, 64, 128), 100)}


class Selector(nn.Module):
    """One number per video, made once, and a small network on two of those numbers and the coarse score.

    366,770 parameters at 512 dimensions, size paper. Its BatchNorm sees the pairs of all ranks.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_dims: int = 512, size: Literal["small", "paper"] = "paper") -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size {size!r} is none of {', '.join(SIZES)}")
        channels, width = SIZES[size]
        self.attention, self.comparator = Attention(num_dims), Comparator(channels)
        self.mlp = nn.ModuleList([*_hidden(3, width), *_hidden(width, width), nn.Linear(width, 1)])
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def index(self, regions: Float[Tensor, "b t r d"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, " b"]:
        """What is stored of each video: how self-similar it is. Raises ValueError for fewer than 4 frames."""
        check_regions(regions, mask)
        means = self.attention(regions).mean(2)
        similarity = means @ means.mT  # the mean over all pairs of regions, where the students take the best
        if mask is None:
            cells, _ = self.comparator(similarity)
            index: Tensor = cells.mean((1, 2))
        else:
            pairs = pair_mask(mask, mask)
            cells, valid = self.comparator(similarity.masked_fill(~pairs, 0), pairs)
            index = cells.masked_fill(~valid, 0).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
        return index

    def forward(
        self,
        query: Float[Tensor, " b"],
        target: Float[Tensor, " b"],
        coarse_similarity: Float[Tensor, " b"],
        weight: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, " b"]:
        """Logits that each pair needs the fine score, from both videos' numbers and the coarse similarity as it is."""
        x, weight = torch.stack([query, target, coarse_similarity], dim=1), torch.ones_like(query) if weight is None else weight
        for layer in self.mlp:
            x = layer(x, weight) if isinstance(layer, BatchNorm) else layer(x)
        return x[:, 0]


def load_reference(state_dict: Mapping[str, Tensor], **architecture: Any) -> Selector:
    """A selector from the `model` of a checkpoint of mever-team/distill-and-select."""
    selector = Selector(**architecture)
    state_dict = {name: value for name, value in state_dict.items() if not name.endswith("num_batches_tracked")}
    load_renamed(selector, state_dict, {"visil_head.": "comparator.", "mlp.model.": "mlp."})
    return selector


def _hidden(num_in: int, num_out: int) -> tuple[nn.Module, ...]:
    return nn.Linear(num_in, num_out, bias=False), BatchNorm(num_out), nn.ReLU(), nn.Dropout(0.5)
