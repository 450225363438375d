"""EfficientNet-Lite image classifiers, applied frame by frame and pooled over time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vkd.clips import Sampling
from vkd.descriptors import Form, StageLabels, Substages, check_options, chosen
from vkd.efficientnet import NUM_CLASSES, NUM_FEATURES, VARIANTS, EfficientNetLite, fold_batch_norms, packaged_weights, preprocess
from vkd.errors import TeacherError
from vkd.schema import FRAMES, Columns, TensorType
from vkd.stage_maps import frames_as_map, replaced, stage_maps
from vkd.teachers.base import PRECISIONS, HalvingBatches, Teacher
from vkd.weights import load_weights, named

PROBED_PX = 32  # the least that all strides divide


@dataclass(eq=False, repr=False)
class EfficientNetLiteTeacher(Teacher):
    """ImageNet logits and pooled features of each frame, pooled over the frames of the clip.

    `pool` is `mean` or `max` over frames, of logits and of features alike; `weights` names a state dict to use instead of the
    installed package's; `batch_size` counts clips of one pass on a GPU and halves by itself when its memory is short.
    `resize` is of the frames that it looks at: beside a student that learns from its maps, the student's, bilinear.
    Precision has no `auto`: labels must name theirs before any device is known. `substages` adds descriptors of the maps of
    these blocks (true: of four at the ends of resolutions), over all frames of the clip.
    """

    version = 1
    places = ("weights",)

    variant: int = 0
    num_frames: int = 8
    batch_size: int = 8
    precision: str = "fp32"
    pool: str = "mean"
    resize: Literal["bilinear", "bicubic"] = "bicubic"
    weights: str | None = None
    substages: Substages = False
    descriptors: Form = "proj128"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("variant", self.variant, tuple(VARIANTS)),
            ("pool", self.pool, ("mean", "max")),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it can be {', '.join(map(str, known))}")
        check_options(self.substages, self.descriptors)
        # bicubic because TensorFlow's bilinear, which they were trained with, does not antialias: timm found it the closer match
        self.sampling = Sampling(num_frames=self.num_frames, size_px=VARIANTS[self.variant].size_px, resize=self.resize)
        self._batches = HalvingBatches(self.batch_size)
        self._network: EfficientNetLite | None = None

    @property
    def emits(self) -> Mapping[str, TensorType]:
        pooled = {"logits": TensorType("float32", (NUM_CLASSES,)), "embedding": TensorType("float32", (NUM_FEATURES,))}
        return pooled | self._stages.emits

    def identity(self) -> dict[str, Any]:
        with self._weights_path().open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "name": "efficientnet_lite",
            "version": self.version,
            "variant": self.variant,
            "pool": self.pool,
            "precision": self.precision,
            "weights_sha256": digest,
            **self._stages.identity(),
        }

    def load(self, device: str) -> None:
        network = EfficientNetLite(VARIANTS[self.variant])
        load_weights(network, self._weights_path())
        network = fold_batch_norms(network.eval()).requires_grad_(False)
        self._network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._stages.to(device)
        # measured: one clip's activations stay in a CPU's cache; eight at a time cost 1.2 to 1.8 times as much a clip
        self._batches = HalvingBatches(1 if device == "cpu" else self.batch_size, device, self.precision)

    @property
    def module(self) -> EfficientNetLite:
        if self._network is None:
            raise TeacherError("efficientnet_lite is not loaded", action="call load(device) first")
        return self._network

    def __call__(self, batch: Columns) -> Columns:
        return batch | self._batches.run(self._labels, batch[FRAMES])

    def _labels(self, clips: UInt8[Tensor, "b t s s 3"]) -> dict[str, Float[Tensor, "b ..."]]:
        network, images = self.module, preprocess(clips.flatten(0, 1))
        maps, outputs = stage_maps(network, self._stages.names, lambda: network(images))
        pooled = (self._pooled(output, clips) for output in outputs)
        described: dict[str, Tensor] = self._stages([frames_as_map(x, *clips.shape[:2]) for x in maps])
        return dict(zip(("logits", "embedding"), pooled, strict=True)) | described

    def _pooled(self, output: Float[Tensor, "bt d"], clips: UInt8[Tensor, "b t s s 3"]) -> Float[Tensor, "b d"]:
        per_frame = output.float().reshape(*clips.shape[:2], output.shape[1])
        return per_frame.mean(dim=1) if self.pool == "mean" else per_frame.amax(dim=1)

    @property
    def stage_names(self) -> Sequence[str]:
        return self._stages.names or self.module.substages

    @torch.no_grad()
    def maps(self, frames: UInt8[Tensor, "b t s s 3"], names: Sequence[str] | None = None) -> list[Float[Tensor, "b _ t _ _"]]:
        network, images = self.module, preprocess(frames.flatten(0, 1))
        names = self.stage_names if names is None else names
        with self._batches.autocast:
            # '' is the network itself: it would end last, so it stops where the maps are there
            maps, _ = stage_maps(network, [*names, ""], lambda: network(images), len(names))
        return [frames_as_map(x, *frames.shape[:2]) for x in maps]

    def logits_from(self, frames: UInt8[Tensor, "b t s s 3"], outputs: Mapping[str, Tensor]) -> Float[Tensor, "b c"]:
        network, images = self.module, preprocess(frames.flatten(0, 1))
        with self._batches.autocast, replaced(network, outputs):
            logits, _ = network(images)
        return self._pooled(logits, frames)

    @cached_property
    def _stages(self) -> StageLabels:
        """Asks a network of random weights for its channels: what is emitted must be known before `load`."""
        if not self.substages:
            return StageLabels((), (), self.descriptors)
        with torch.random.fork_rng(devices=()), torch.no_grad():
            network, image = EfficientNetLite(VARIANTS[self.variant]).eval(), torch.zeros(1, 3, PROBED_PX, PROBED_PX)
            names = chosen(self.substages, network.substages)
            maps, _ = stage_maps(network, names, lambda: network(image))
        return StageLabels(names, [frames_as_map(x, 1, 1).shape[1] for x in maps], self.descriptors)

    def _weights_path(self) -> Path:
        """Raises TeacherError when there is no such file."""
        return packaged_weights(self.variant) if self.weights is None else named(self.weights)
