"""Blocks of video similarity networks: attention, binary codes, Chamfer similarity, the ViSiL comparator, NetVLAD.

Regions [b, t, r, d] are b videos of t frames with r region vectors each. A mask is true where a frame is real. After
Kordopatis-Zilos et al. 2019 (ViSiL) and 2022 (DnS, Distill-and-Select).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vkd.errors import ConfigError

ERF_VARIANCE = 1e-6  # of the noise whose expected sign a code is while training
MIN_FRAMES = 4  # the comparator halves time twice
ITQ_STEPS = 50
BLOCK_FRAMES = 32  # of a query, compared at once when no gradient is needed
Padding = Literal["zeros", "replicate"]  # of a map, before it is convolved


class Attention(nn.Module):
    """Each vector times a learned weight in (0, 1): the sigmoid of a context vector's product with its tanh transform."""

    def __init__(self, num_dims: int) -> None:
        super().__init__()
        self.transform, self.context_vector = nn.Linear(num_dims, num_dims), nn.Linear(num_dims, 1, bias=False)
        nn.init.xavier_uniform_(self.transform.weight)
        nn.init.zeros_(self.transform.bias)
        nn.init.xavier_uniform_(self.context_vector.weight)

    @torch.no_grad()
    def start_even(self) -> None:
        """Give every vector a weight near 1/2, within a few hundredths: which ones count more is learned, and not drawn."""
        self.context_vector.weight.mul_(0.1)

    def weights(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b 1"]:
        weights: Tensor = self.context_vector(self.transform(x).tanh()).sigmoid()
        return weights

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return x * self.weights(x)


class CosineAttention(nn.Module):
    """Each vector times (u.x + 1) / 2, which is in [0, 1] while u and x are unit vectors; u is used as it is."""

    def __init__(self, num_dims: int) -> None:
        super().__init__()
        self.context_vector = nn.Linear(num_dims, 1, bias=False)
        with torch.no_grad():
            self.context_vector.weight.copy_(F.normalize(torch.randn(1, num_dims), dim=1))

    @torch.no_grad()
    def start_even(self) -> None:
        """Give every vector a weight near 1/2, as `Attention.start_even` does: what was drawn is no reason to count more."""
        self.context_vector.weight.mul_(0.1)

    def weights(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b 1"]:
        weights: Tensor = self.context_vector(x) / 2 + 0.5
        return weights

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return x * self.weights(x)


class Binarization(nn.Module):
    """Codes of +1 and -1: signs of a projection; while training their expectation under noise, so that a gradient flows.

    Never under autocast: few bits have a gradient, and those are within 0.003 of zero. W starts as a random rotation.
    """

    def __init__(self, num_dims: int, num_bits: int) -> None:
        super().__init__()
        self.W = nn.Parameter(nn.init.orthogonal_(torch.empty(num_dims, num_bits)))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        with torch.autocast(x.device.type, enabled=False):
            z = F.normalize(x.to(self.W.dtype), dim=-1) @ self.W
            return torch.erf(z / math.sqrt(2 * ERF_VARIANCE)) if self.training else z.sign()


def itq_rotation(x: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "d d"]:
    """The rotation of unit rows whose signs lose least: iterative quantisation (Gong & Lazebnik 2011), a start for `Binarization.W`."""
    rotation: Tensor = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=x.dtype))[0]
    for _ in range(ITQ_STEPS):
        left, _, right = torch.linalg.svd(x.T @ (x @ rotation).sign())
        rotation = left @ right
    return rotation


def chamfer(
    similarity: Float[Tensor, "*b n m"], mask: Bool[Tensor, "*b n m"] | None = None, *, symmetric: bool = False
) -> Float[Tensor, "*b"]:
    """Mean over rows of the best column: how well what the rows are is found in the columns. `symmetric`: the mean of both ways.

    Cells where the mask is false do not count, nor rows without any other; with none left it is 0.
    """
    if symmetric:
        return (chamfer(similarity, mask) + chamfer(similarity.mT, None if mask is None else mask.mT)) / 2
    if mask is None:
        return similarity.amax(-1).mean(-1)
    best, valid = similarity.masked_fill(~mask, -math.inf).amax(-1), mask.any(-1)
    return best.masked_fill(~valid, 0).sum(-1) / valid.sum(-1).clamp(min=1)


def frame_similarity(
    query: Float[Tensor, "#b n r d"], target: Float[Tensor, "#b m s d"], *, symmetric: bool = False
) -> Float[Tensor, "#b n m"]:
    """Chamfer similarity over regions of all pairs of frames: mean over a query's regions of the best target region.

    Memory is that of n * r * m values, without a gradient of 32 * r * m. A batch of one is compared with each of the other.
    """
    num_pairs = max(len(query), len(target))
    query, target = query.expand(num_pairs, -1, -1, -1), target.expand(num_pairs, -1, -1, -1)
    forth = _region_chamfer(query, target)
    return (forth + _region_chamfer(target, query).mT) / 2 if symmetric else forth


def _region_chamfer(query: Float[Tensor, "b n r d"], target: Float[Tensor, "b m s d"]) -> Float[Tensor, "b n m"]:
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or target.requires_grad)
    parts = [query] if needs_gradient else torch.split(query, BLOCK_FRAMES, 1)
    return torch.cat([_RegionChamfer.apply(part, target) for part in parts], 1)  # type: ignore[no-untyped-call]


class _RegionChamfer(torch.autograd.Function):
    """One matrix product per target region. Autograd would keep them all; a byte that says which was best is enough."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, target: Tensor) -> Tensor:
        rows = query.flatten(1, 2)
        best = rows @ target[:, :, 0].mT
        chosen = torch.zeros_like(best, dtype=torch.uint8) if any(ctx.needs_input_grad) else None
        for region in range(1, target.shape[2]):
            similarity = rows @ target[:, :, region].mT
            if chosen is not None:
                chosen.masked_fill_(similarity > best, region)
            best = torch.maximum(best, similarity)
        ctx.save_for_backward(query, target, chosen)
        means: Tensor = best.view(*query.shape[:3], -1).mean(2)
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        query, target, chosen = ctx.saved_tensors
        rows, num_regions = query.flatten(1, 2), query.shape[2]
        per_row = (gradients[0].to(query.dtype) / num_regions).repeat_interleave(num_regions, 1)
        of_rows, of_target = torch.zeros_like(rows), torch.empty_like(target)
        for region in range(target.shape[2]):
            share = per_row.masked_fill(chosen != region, 0)
            of_rows += share @ target[:, :, region]
            of_target[:, :, region] = share.mT @ rows
        return of_rows.view_as(query), of_target


def pair_mask(query: Bool[Tensor, "#b n"], target: Bool[Tensor, "#b m"]) -> Bool[Tensor, "#b n m"]:
    """True where both frames are real."""
    return query[:, :, None] & target[:, None, :]


class Comparator(nn.Module):
    """The CNN of ViSiL over a frame-to-frame similarity map: [n, m] to [n // 4, m // 4], zero wherever no frame pair is real.

    With a mask, a cell stays when any of its frame pairs is real, so a padded map keeps the last frames that an unpadded one drops
    when its length is no multiple of 4. Cells of the last map are not zeroed where the mask, which comes with it, is false.
    """

    def __init__(self, channels: tuple[int, int, int] = (32, 64, 128), padding: Padding = "zeros") -> None:
        super().__init__()
        convs = [nn.Conv2d(i, o, 3, padding=1, padding_mode=padding) for i, o in zip((1, *channels), channels, strict=False)]
        self.conv1, self.conv2, self.conv3 = convs
        self.fconv = nn.Conv2d(channels[2], 1, 1)
        for conv in (*convs, self.fconv):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def start_by_runs(self, gain: float) -> None:
        """Make it give `gain` times the best run of each 4x4 cells: the mean of three frames that follow each other in both videos.

        Its first channel does so; the others start as they are, and count once `fconv` has learned to. From random weights ranking
        begins far below that of the map alone, and short training does not catch up.
        """
        for conv in (self.conv1, self.conv2, self.conv3, self.fconv):
            conv.weight[0] = 0
            conv.weight[0, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1
        self.conv1.weight[0, 0] = torch.eye(3) / 3
        self.fconv.weight.zero_()[0, 0] = gain

    def forward(
        self, similarity: Float[Tensor, "b n m"], mask: Bool[Tensor, "b n m"] | None = None
    ) -> tuple[Float[Tensor, "b i j"], Bool[Tensor, "b i j"] | None]:
        if min(similarity.shape[1:]) < MIN_FRAMES:
            raise ValueError(f"{list(similarity.shape[1:])} frames: at least {MIN_FRAMES} of each video are needed, repeat a short one's")
        x, valid = similarity[:, None], None if mask is None else mask[:, None]
        for conv in (self.conv1, self.conv2):
            x = F.relu(F.max_pool2d(_kept(conv(x), valid), 2))
            valid = None if valid is None else F.max_pool2d(valid.to(x.dtype), 2) > 0
        x = self.fconv(F.relu(_kept(self.conv3(x), valid)))
        return x[:, 0], None if valid is None else valid[:, 0]


class NetVLAD(nn.Module):
    """Residuals of frames to cluster centres, summed by soft assignment, normalised and projected (Arandjelovic et al. 2016).

    The first of the outputs start as the clusters' mean, turned, and all with a bias of 1: two videos' similarity starts near the cosine
    of their mean features, mapped from [-1, 1] to [0, 1].
    """

    def __init__(self, num_dims: int, num_clusters: int, num_outputs: int) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.randn(num_clusters, num_dims) / math.sqrt(num_dims))
        self.assign = nn.Linear(num_dims, num_clusters, bias=False)
        self.reduce = nn.Linear(num_clusters * num_dims, num_outputs, bias=False)
        self.norm = nn.LayerNorm(num_outputs)
        with torch.no_grad():
            self.assign.weight.copy_(self.centroids)
        nn.init.normal_(self.reduce.weight, std=1 / math.sqrt(num_clusters * num_dims))
        with torch.no_grad():
            turned = nn.init.orthogonal_(torch.empty(min(num_dims, num_outputs), num_dims))
            self.reduce.weight[: len(turned)] = turned.repeat(1, num_clusters) / math.sqrt(num_clusters)
        nn.init.ones_(self.norm.bias)

    def forward(self, x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b o"]:
        share = self.assign(x).softmax(dim=2)  # [b, t, k]
        if mask is not None:
            share = share.masked_fill(~mask[:, :, None], 0)
        residuals = share.mT @ x - share.sum(1)[:, :, None] * self.centroids  # what a loop over clusters sums, at once
        flat = F.normalize(F.normalize(residuals, dim=2).flatten(1), dim=1)
        y: Tensor = self.norm(self.reduce(flat))
        return y


def check_regions(regions: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError when regions are not [videos, frames, regions, dimensions], or a mask is not [videos, frames]."""
    if regions.ndim != 4 or (mask is not None and mask.shape != regions.shape[:2]):
        masked = "" if mask is None else f" with a mask {list(mask.shape)}"
        raise ValueError(f"regions {list(regions.shape)}{masked} are not [videos, frames, regions, dims]; of one video give regions[None]")


def load_renamed(module: nn.Module, state_dict: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> None:
    """Load a state dict whose keys start with other names, in its precision. Raises ConfigError when it is not that of the module."""
    renamed = {}
    for key, value in state_dict.items():
        old = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + key.removeprefix(old)] = value
    try:
        module.to(next((value.dtype for value in renamed.values()), None)).load_state_dict(renamed)
    except RuntimeError as error:
        action = "give the architecture that these weights were trained with"
        _, _, details = str(error).partition("\n")
        raise ConfigError(
            f"weights of another network: {' '.join(details.split())[:200]}", where=type(module).__name__, action=action
        ) from error


def _kept(x: Float[Tensor, "b c n m"], mask: Bool[Tensor, "b 1 n m"] | None) -> Float[Tensor, "b c n m"]:
    return x if mask is None else x.masked_fill(~mask, 0)
