"""Videos as sequences of region features: how they are lengthened, disturbed and put in batches. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_FRAMES = 300  # of a video in training, at one frame per second
MIN_AUGMENTED_FRAMES = 9
MIN_WINDOW_FRAMES, MAX_WINDOW_FRAMES = 4, 15
DROP = 0.3  # probability of each window
MAX_SLOWED_FRAMES = 149


def tiled(regions: Float[Tensor, "t r d"], min_frames: int = 4) -> Float[Tensor, "u r d"]:
    """The video, doubled until it has at least so many frames: the comparator needs 4. Raises ValueError when it has none."""
    if len(regions) == 0:
        raise ValueError("a video without frames cannot be repeated: reject it")
    while len(regions) < min_frames:
        regions = torch.cat([regions, regions])
    return regions


def augmented_frames(num_frames: int, rng: np.random.Generator) -> Int[np.ndarray, " t"]:
    """Which frames of a video are seen, in which order: half of the time as they are, else disturbed in one way; 300 at most.

    Of videos longer than 8 frames a tenth each: some windows dropped, windows shuffled, every other frame, each frame twice (if
    shorter than 150), backwards. Windows are of 4 to 15 frames, the last filled up from the start (Kordopatis-Zilos et al. 2022).
    """
    frames = np.arange(num_frames)
    draw = rng.random() if num_frames >= MIN_AUGMENTED_FRAMES else 1.0
    if draw < 0.2:
        size = int(rng.integers(MIN_WINDOW_FRAMES, MAX_WINDOW_FRAMES + 1))
        windows = np.resize(frames, (-(-num_frames // size), size))  # starts anew at its end
        if draw < 0.1:
            keeps = rng.random(len(windows)) > DROP
            windows = windows[keeps] if keeps.any() else windows
        else:
            rng.shuffle(windows)
        frames = windows.ravel()
    elif draw < 0.3:
        frames = frames[::2]
    elif draw < 0.4:
        frames = frames.repeat(2) if num_frames <= MAX_SLOWED_FRAMES else frames
    elif draw < 0.5:
        frames = frames[::-1]
    return frames[:MAX_FRAMES]


def collate(videos: Sequence[Float[Tensor, "_ r d"]]) -> tuple[Float[Tensor, "b t r d"], Bool[Tensor, "b t"]]:
    """Videos padded with zeros to the longest, and which frames are real. Of triplets: all anchors, then positives, then negatives."""
    regions = torch.nn.utils.rnn.pad_sequence(list(videos), batch_first=True)
    lengths = torch.tensor([len(video) for video in videos])
    return regions, torch.arange(regions.shape[1]) < lengths[:, None]
