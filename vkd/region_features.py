"""Region features of frames: maps of several layers of a frozen network, max-pooled over 3 x 3 overlapping regions.

L-iMAC of Kordopatis-Zilos et al. 2019, "ViSiL: Fine-grained Spatio-Temporal Video Similarity Learning", section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vkd import efficientnet, resnet
from vkd.efficientnet import VARIANTS, EfficientNetLite, fold_batch_norms
from vkd.stage_maps import stage_maps
from vkd.weights import load_weights
from vkd.whitening import Whiten

NUM_REGIONS = 9
MIN_SIZE_PX, MAX_SIZE_PX = 224, 256  # between which the kernels cut every map into 3 x 3 or more, and the last one into 3 x 3


class Backbone(NamedTuple):
    """A network with the parts whose maps are pooled; `kernels` are about half as wide as each one's map of 224 px."""

    read: Callable[[Path], nn.Module]
    preprocess: Callable[[Tensor], Tensor]
    parts: tuple[str, ...]
    kernels: tuple[int, ...]
    num_channels: int  # of all maps together


def _efficientnet_lite0(path: Path) -> nn.Module:
    network = EfficientNetLite(VARIANTS[0])
    load_weights(network, path)
    return fold_batch_norms(network.eval())


def _resnet50(path: Path) -> nn.Module:
    network = resnet.ResNet50()
    load_weights(network, path)
    return network


BACKBONES = {
    "efficientnet_lite0": Backbone(
        _efficientnet_lite0,
        efficientnet.preprocess,
        ("_blocks.4", "_blocks.10", "_blocks.15", "_relu_head"),
        (14, 6, 3, 3),
        40 + 112 + 320 + 1280,
    ),
    "resnet50": Backbone(_resnet50, resnet.preprocess, ("layer1", "layer2", "layer3", "layer4"), (28, 14, 6, 3), 256 + 512 + 1024 + 2048),
}


class RegionNetwork(nn.Module):
    """Frames to region features of unit length, whitened when there is a whitening. In eval mode, without gradients."""

    def __init__(self, backbone: Backbone, weights: Path, whiten: Whiten | None) -> None:
        super().__init__()
        self.backbone, self.network, self.whiten = backbone, backbone.read(weights), whiten
        self.eval().requires_grad_(False)

    def forward(self, frames: UInt8[Tensor, "n s s 3"]) -> Float[Tensor, "n 9 d"]:
        images, parts = self.backbone.preprocess(frames), self.backbone.parts
        # '' is the network itself: it would end last, so it stops where the maps are there
        maps, _ = stage_maps(self.network, [*parts, ""], lambda: self.network(images), len(parts))
        regions = pool_regions([x.float() for x in maps], self.backbone.kernels)
        if self.whiten is not None:
            regions = self.whiten(regions)
        return regions


def pool_regions(maps: Sequence[Float[Tensor, "n _ _ _"]], kernels: Sequence[int]) -> Float[Tensor, "n r c"]:
    """Regions row by row, each with the channels of all maps, of unit length.

    Windows of a map are as wide as its kernel and overlap by half; regions are as many as windows of the last map.
    """
    pooled = [F.normalize(F.max_pool2d(x, kernel, (kernel + 1) // 2)) for x, kernel in zip(maps, kernels, strict=True)]
    sized = [F.normalize(F.adaptive_max_pool2d(x, tuple(pooled[-1].shape[2:]))) for x in pooled]
    return F.normalize(torch.cat(sized, dim=1).flatten(2).transpose(1, 2), dim=2)
