"""ResNet-50, with the keys of torchvision's state dicts (which carry ImageNet weights)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

NUM_CLASSES, NUM_STEM, EXPANSION = 1000, 64, 4
LAYERS = ((3, 64), (4, 128), (6, 256), (3, 512))  # blocks and width of each; He et al. 2016, table 1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images in [0, 1]


class Bottleneck(nn.Module):
    """Residual block of three convolutions; the stride is the middle one's."""

    def __init__(self, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        num_out = width * EXPANSION
        self.conv1, self.bn1 = nn.Conv2d(num_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, num_out, 1, bias=False), nn.BatchNorm2d(num_out)
        if stride > 1 or num_in != num_out:
            self.downsample: nn.Module = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))
        else:
            self.downsample = nn.Identity()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d y x"]:
        hidden = F.relu(self.bn1(self.conv1(x)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        return F.relu(self.bn3(self.conv3(hidden)) + self.downsample(x))


class ResNet50(nn.Module):
    """The network; the maps of `layer1` to `layer4` have 256, 512, 1024 and 2048 channels at 1/4 to 1/32 of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, NUM_STEM, 7, 2, 3, bias=False), nn.BatchNorm2d(NUM_STEM)
        num_in = NUM_STEM
        for number, (num_blocks, width) in enumerate(LAYERS, 1):
            strides = [1 if number == 1 else 2] + [1] * (num_blocks - 1)
            blocks = [Bottleneck(num_in if i == 0 else width * EXPANSION, width, stride) for i, stride in enumerate(strides)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            num_in = width * EXPANSION
        self.fc = nn.Linear(num_in, NUM_CLASSES)

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n 1000"]:
        """Logits of images scaled by `preprocess`."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        for number in range(1, len(LAYERS) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def preprocess(images: UInt8[Tensor, "n s s 3"]) -> Float[Tensor, "n 3 s s"]:
    """In units of ImageNet's standard deviation from its mean, in channels-last memory."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255).sub_(mean).div_(std)
