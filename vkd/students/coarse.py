"""The coarse-grained DnS student g^C: one vector per video (Kordopatis-Zilos et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vkd.similarity_layers import Attention, NetVLAD, check_regions, load_renamed
from vkd.students.base import Comparison, SimilarityStudent


class Size(NamedTuple):
    """Of the transformer its heads and width between, of NetVLAD its clusters and outputs."""

    num_heads: int
    num_hidden: int
    num_clusters: int
    num_outputs: int


SIZES = {"small": Size(4, 256, 16, 256), "paper": Size(8, 2048, 64, 1024)}


class CoarseStudent(SimilarityStudent):
    """Attention over regions, their sum, one transformer layer over frames without positions, NetVLAD: blind to the order of frames.

    37,038,592 parameters at 512 dimensions, size paper. Unlike the fine students, padding does not change what it gives.
    """

    unit = True

    def __init__(self, num_dims: int = 512, size: Literal["small", "paper"] = "paper") -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size {size!r} is none of {', '.join(SIZES)}")
        num_heads, num_hidden, num_clusters, num_outputs = SIZES[size]
        self.attention = Attention(num_dims)
        layer = nn.TransformerEncoderLayer(num_dims, num_heads, num_hidden, batch_first=True)
        for start_at_0 in (layer.linear1.bias, layer.linear2.bias, layer.linear2.weight, layer.self_attn.out_proj.weight):
            nn.init.zeros_(start_at_0)  # both branches, as their biases are: what is added to a frame is learned
        self.transformer = nn.TransformerEncoder(layer, 1, nn.LayerNorm(num_dims), enable_nested_tensor=False)
        self.netvlad = NetVLAD(num_dims, num_clusters, num_outputs)

    def index(self, regions: Float[Tensor, "b t r d"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b o"]:
        """A unit vector per video; the product of two is their similarity, learned against fine scores mapped to [0, 1]."""
        check_regions(regions, mask)
        frames = F.normalize(self.attention(regions).sum(2), dim=2)
        # a video without frames, the masked row of a rank that has none, attends to its padding: softmax of nothing would be nan
        ignored = None if mask is None else ~mask & mask.any(1, keepdim=True)
        frames = self.transformer(frames, src_key_padding_mask=ignored)
        return F.normalize(self.netvlad(frames, mask), dim=1)

    def compare_pairs(
        self,
        queries: Float[Tensor, "#b o"],
        targets: Float[Tensor, "b o"],
        query_mask: Bool[Tensor, "#b n"] | None = None,
        target_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Comparison:
        return Comparison((queries * targets).sum(1), None, None)

    def pair(self, query: Float[Tensor, " o"], target: Float[Tensor, " o"]) -> Float[Tensor, ""]:
        return query @ target


def load_reference(state_dict: Mapping[str, Tensor], **architecture: Any) -> CoarseStudent:
    """A coarse student from the `model` of a checkpoint of mever-team/distill-and-select."""
    student, conv = CoarseStudent(**architecture), "netvlad.conv.weight"
    flat = {key: value.flatten(1) if key == conv else value for key, value in state_dict.items()}
    load_renamed(student, flat, {"netvlad.conv.": "netvlad.assign.", "netvlad.reduction_layer.": "netvlad.reduce."})
    return student
