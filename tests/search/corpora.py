"""Small networks with drawn weights, and videos of drawn regions, some of them copies of parts of others."""

from __future__ import annotations

import numpy as np
import paired
import torch
import torch.nn.functional as F

from vkd.search.index import Features, Video
from vkd.search.networks import Networks
from vkd.students.coarse import CoarseStudent
from vkd.students.selector import Selector
from vkd.students.visil import FineStudent

DIMS = 32
FEATURES = Features("regions-0123", 1.0, {"name": "regions"}, {"name": "regions"})


def networks(kind: str = "binary", seed: int = 0) -> Networks:
    torch.manual_seed(seed)
    fine = paired.with_drawn_weights(FineStudent(kind, DIMS, 64, "small").eval())  # type: ignore[arg-type]
    coarse, selector = CoarseStudent(DIMS, "small").eval(), Selector(DIMS, "small").eval()
    files = {f"{part}/model.safetensors": f"{kind} {seed}".encode() for part in ("coarse", "fine", "selector")}
    return Networks(coarse, fine, selector, FEATURES.name, files)


def regions(num_frames: int, seed: int) -> np.ndarray:
    drawn = torch.randn(num_frames, 9, DIMS, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=2).numpy()


def corpus(count: int, lengths: tuple[int, ...] = (5, 12, 30, 3)) -> tuple[list[Video], dict[str, np.ndarray]]:
    """Ids fall as numbers rise, so that ties are seen to be broken by id."""
    read = {f"shard/{i}": regions(lengths[i % len(lengths)], i) for i in range(count)}
    return [Video(name, f"id{count - i:04}", f"{name}.mp4", float(len(read[name]))) for i, name in enumerate(read)], read
