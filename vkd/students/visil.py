"""Fine-grained video similarity: the DnS students f^A and f^B, and the ViSiL head that taught the first of them.

Kordopatis-Zilos et al. 2022 (DnS) and 2019 (ViSiL). Input are region features, not frames of pixels; a score says how well the
query is found in the target, so swapping them changes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vkd.similarity_layers import (
    MIN_FRAMES,
    Attention,
    Binarization,
    Comparator,
    CosineAttention,
    Padding,
    chamfer,
    check_regions,
    frame_similarity,
    load_renamed,
    pair_mask,
)
from vkd.students.base import Comparison, SimilarityStudent

CHANNELS = {"small": (8, 16, 32), "paper": (32, 64, 128)}  # of the comparator
CHUNK_FRAMES = 2048  # of a target, when scored exactly as the reference does
HALVED_TWICE = 4.0  # attention starts with weights near 1/2, in both videos: what makes up for it
Size = Literal["small", "paper"]


class Visil(SimilarityStudent):
    """Encoded regions -> frame-to-frame similarity -> comparator -> hard tanh -> Chamfer similarity over time.

    Two ways to score give different numbers: `exact`, unpadded, is how the reference evaluates; `padded`, with masks, is how it
    trains. They agree when no length leaves a remainder modulo 4 (see `Comparator`).
    """

    unit = False

    def __init__(self, encode: nn.Module, comparator: Comparator, *, num_bits: int = 1, symmetric: bool = False) -> None:
        super().__init__()
        self.encode, self.comparator, self.num_bits, self.symmetric = encode, comparator, num_bits, symmetric

    def index(self, regions: Float[Tensor, "b t r d"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b t r k"]:
        """What is stored of each video: encoded regions, zero where the mask is false."""
        check_regions(regions, mask)
        encoded: Tensor = self.encode(regions)
        return encoded if mask is None else encoded.masked_fill(~mask[:, :, None, None], 0)

    def frames(self, query: Float[Tensor, "#b n r k"], target: Float[Tensor, "#b m r k"]) -> Float[Tensor, "#b n m"]:
        """Frame-to-frame similarity of indexed videos; of binary codes 1 - 2 * Hamming distance / bits."""
        similarity = frame_similarity(query, target, symmetric=self.symmetric)
        return similarity if self.num_bits == 1 else similarity / self.num_bits

    def compare(self, frames: Float[Tensor, "b n m"], mask: Bool[Tensor, "b n m"] | None = None) -> Comparison:
        """From frame-to-frame similarity on. Raises ValueError for fewer than 4 frames."""
        cells, mask = self.comparator(frames if mask is None else frames.masked_fill(~mask, 0), mask)
        return Comparison(chamfer(F.hardtanh(cells), mask, symmetric=self.symmetric), cells, mask)

    def compare_pairs(
        self,
        queries: Float[Tensor, "#b n r k"],
        targets: Float[Tensor, "b m r k"],
        query_mask: Bool[Tensor, "#b n"] | None = None,
        target_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Comparison:
        check_regions(queries, query_mask)
        check_regions(targets, target_mask)
        mask = None if query_mask is None or target_mask is None else pair_mask(query_mask, target_mask)
        return self.compare(self.frames(queries, targets), mask)

    def padded(
        self,
        queries: Float[Tensor, "a n r k"],
        targets: Float[Tensor, "b m r k"],
        query_mask: Bool[Tensor, "a n"],
        target_mask: Bool[Tensor, "b m"],
    ) -> Float[Tensor, "a b"]:
        """Scores of all pairs of indexed videos."""
        rows = [
            self.compare_pairs(query[None], targets, real[None], target_mask).similarity
            for query, real in zip(queries, query_mask, strict=True)
        ]
        return torch.stack(rows)

    def pair(self, query: Float[Tensor, "n r k"], target: Float[Tensor, "m r k"]) -> Float[Tensor, ""]:
        return self.exact(query, target)

    def exact(self, query: Float[Tensor, "n r k"], target: Float[Tensor, "m r k"]) -> Float[Tensor, ""]:
        """Score of one pair of indexed videos of at least 4 frames, without padding; of longer targets the mean over 2048-frame parts."""
        check_regions(query[None], None)
        check_regions(target[None], None)
        parts = [part for part in torch.split(target, CHUNK_FRAMES) if len(part) >= MIN_FRAMES or len(target) < MIN_FRAMES]
        return torch.stack([self.compare(self.frames(query[None], part[None])).similarity[0] for part in parts]).mean()


class FineStudent(Visil):
    """The fine-grained student: f^A weighs regions by attention, f^B stores them as bits, `plain` as they are.

    Parameters at 512 dimensions, size paper: attention 355,969 (18 KB stored per frame of 9 regions), binary 354,945 (576 bytes
    once packed), plain 92,801.
    """

    def __init__(
        self, kind: Literal["attention", "binary", "plain"] = "attention", num_dims: int = 512, num_bits: int = 512, size: Size = "paper"
    ) -> None:
        comparator = Comparator(_channels(size))
        comparator.start_by_runs(HALVED_TWICE if kind == "attention" else 1.0)
        if kind == "binary":
            if num_bits % 8 or num_bits < 8:
                raise ValueError(f"num_bits is {num_bits}; codes are stored in bytes, so it must be a multiple of 8")
            super().__init__(Binarization(num_dims, num_bits), comparator, num_bits=num_bits)
        elif kind == "attention":
            attention = Attention(num_dims)
            attention.start_even()
            super().__init__(attention, comparator)
        elif kind == "plain":
            super().__init__(nn.Identity(), comparator)
        else:
            raise ValueError(f"kind {kind!r} is none of attention, binary, plain")


class VisilHead(Visil):
    """The teacher: ViSiL_v with 3840 dimensions, or ViSiL_sym, which averages both directions, with 512. Scores `exact` only.

    Parameters, size paper: 96,641 with 3840 dimensions, 93,313 with 512. The published ones pad the map by its border, where the
    students pad zeros; one that is trained for them may pad zeros too, and then begins with their comparator.
    """

    masked = False

    def __init__(self, num_dims: int = 3840, symmetric: bool = False, size: Size = "paper", padding: Padding = "replicate") -> None:
        attention = CosineAttention(num_dims)  # a trained one, so its context need not stay a unit vector, as the published one is
        attention.start_even()
        super().__init__(attention, Comparator(_channels(size), padding), symmetric=symmetric)
        self.comparator.start_by_runs(HALVED_TWICE)


def load_reference(state_dict: Mapping[str, Tensor], **architecture: Any) -> FineStudent:
    """A fine-grained student from the `model` of a checkpoint of mever-team/distill-and-select."""
    student = FineStudent(**architecture)
    load_renamed(student, state_dict, {"attention.": "encode.", "binarization.": "encode.", "visil_head.": "comparator."})
    return student


def load_reference_head(state_dict: Mapping[str, Tensor], **architecture: Any) -> VisilHead:
    """The teacher from a ViSiL checkpoint of MKLab-ITI/visil, branch pytorch."""
    head = VisilHead(**architecture)
    load_renamed(head, state_dict, {"attention.": "encode.", "video_comperator.": "comparator."})
    return head


def _channels(size: str) -> tuple[int, int, int]:
    if size not in CHANNELS:
        raise ValueError(f"size {size!r} is none of {', '.join(CHANNELS)}")
    return CHANNELS[size]
