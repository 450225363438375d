"""A trained similarity student as a teacher of pairs: how alike each anchor and its candidates are."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from vkd import models
from vkd.checkpoint import load_similarity, read_export
from vkd.clips import uniform_numbers
from vkd.errors import ConfigError, TeacherError
from vkd.region_store import RegionStore
from vkd.regions import tiled
from vkd.schema import Columns, TensorType
from vkd.similarity_layers import chamfer, frame_similarity
from vkd.store import files
from vkd.students import STUDENTS
from vkd.students.base import SimilarityStudent
from vkd.teachers.base import Teacher

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ANCHOR, OTHERS, FEATURES, SCORES = "anchor", "others", "features", "scores"
PROBE = "probe/"  # begins the names of built-in videos, where others have a shard
NUM_PROBES, PROBE_FRAMES, PROBE_SHAPE = 16, 12, (9, 16)  # regions and dimensions where no student says them
_UNREADABLE = (FileNotFoundError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError, ConfigError)


class RawChamfer(nn.Module):
    """Untrained: Chamfer similarity over the regions of features as they are, then over frames."""

    def index(self, regions: Float[Tensor, "b t r d"]) -> Float[Tensor, "b t r d"]:
        return regions

    def pair(self, query: Float[Tensor, "n r d"], target: Float[Tensor, "m r d"]) -> Float[Tensor, ""]:
        return chamfer(frame_similarity(query[None], target[None]))[0]


class RawMean(nn.Module):
    """Untrained: the cosine of mean features."""

    def index(self, regions: Float[Tensor, "b t r d"]) -> Float[Tensor, "b d"]:
        return F.normalize(regions.mean((1, 2)), dim=1)

    def pair(self, query: Float[Tensor, " d"], target: Float[Tensor, " d"]) -> Float[Tensor, ""]:
        return query @ target


Network = SimilarityStudent | RawChamfer | RawMean
RAW: Mapping[str, type[RawChamfer | RawMean]] = {"chamfer": RawChamfer, "mean": RawMean}


class PairScoresTeacher(Teacher):
    """The score of each candidate of each anchor, direction anchor -> candidate, on the network's own scale; nothing is decoded.

    `path` is the export folder of a similarity student, `store` where the label set of features lies that it was trained on. Without a
    path features of any set are compared as they are, by `kind`: chamfer or mean. Indexed videos are kept while they need at most
    `cache_bytes`, and so are features.
    """

    version = 1
    places = ("store", "path")
    sampling = None

    def __init__(self, store: str, path: str | None = None, kind: str | None = None, cache_bytes: int = 1 << 30) -> None:
        if (path is None) == (kind is None) or (kind is not None and kind not in RAW):
            raise ValueError(f"one of path and kind ({', '.join(RAW)}) is given; they are {path!r} and {kind!r}")
        self.store, self.path, self.kind, self.cache_bytes = store, path, kind, cache_bytes
        self._device, self._indexed = "", Kept(cache_bytes)
        self._opened: RegionStore | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ANCHOR, OTHERS, FEATURES

    @property
    def emits(self) -> Mapping[str, TensorType]:
        return {SCORES: TensorType("float32", (None,))}

    def identity(self) -> dict[str, Any]:
        told = {"name": "pair_scores", "version": self.version, "precision": "fp32"}
        if self.path is None:
            return told | {"kind": self.kind}
        return told | {"sha256": {name: hashlib.sha256(self._read(name)).hexdigest() for name in (CONFIG, WEIGHTS)}}

    @property
    def unit(self) -> bool | None:
        """Whether scores are on [0, 1], as coarse ones are, and not on [-1, 1]; None when nothing was trained."""
        if self.path is None:
            return None
        found: bool | None = getattr(models.find(read_export(self.path)[1], STUDENTS, "student"), "unit", None)
        return found

    def load(self, device: str) -> None:
        _ = self._trained_on  # a broken export is told now
        self._network.to(device)
        self._device, self._indexed = device, Kept(self.cache_bytes)

    @property
    def module(self) -> nn.Module:
        return self._network

    def __call__(self, batch: Columns) -> dict[str, Any]:
        if not self._device:
            raise TeacherError("the student is not loaded", where=self.path or "", action="call load(device) first")
        rows = zip(*(batch[name].tolist() for name in self.needs), strict=True)
        return batch | {SCORES: [self._scores(anchor, others.split(), features) for anchor, others, features in rows]}

    def probe_batch(self) -> Columns:
        """One row of a built-in video and others that are less and less like it."""
        names = [f"{PROBE}{number}" for number in range(NUM_PROBES + 1)]
        return {ANCHOR: np.array(names[:1]), OTHERS: np.array([" ".join(names)]), FEATURES: np.array([self._trained_on or ""])}

    @torch.inference_mode()
    def _scores(self, anchor: str, others: list[str], features: str) -> Float[np.ndarray, " n"]:
        if self._trained_on not in (None, features):
            what = f"the student was trained on features {self._trained_on}, this row is of {features}"
            raise TeacherError(what, where=self.path or "", action="name a student of these features, or pairs of its features")
        if not others:
            return np.zeros(0, np.float32)
        query, targets = self._video(anchor, features), (self._video(other, features) for other in others)
        if query.ndim == 1:  # a coarse student's vectors
            scores = torch.stack(list(targets)) @ query
        else:
            scores = torch.stack([self._network.pair(query, target) for target in targets])
        found: Float[np.ndarray, " n"] = scores.float().cpu().numpy()
        return found

    def _video(self, name: str, features: str) -> Tensor:
        """An indexed video, without batch axis, on the device."""

        def indexed() -> Tensor:
            regions = self._built_in(name) if name.startswith(PROBE) else self._store(features).read(name)
            return self._network.index(tiled(torch.tensor(regions).to(self._device))[None])[0]

        return self._indexed.get(f"{features}/{name}", indexed)

    def _built_in(self, name: str) -> Float[np.ndarray, "t r d"]:
        """Hashed unit vectors; number k has k parts in 16 of its own, the rest is that of number 0."""
        store = None if self._trained_on is None else self._store(self._trained_on)
        shape = PROBE_FRAMES, *(PROBE_SHAPE if store is None else (store.num_regions, store.num_dims))
        number = int(name.removeprefix(PROBE))
        first, own = (uniform_numbers(f"{PROBE}{k}", int(np.prod(shape))).reshape(shape) - 0.5 for k in (0, number))
        mixed = (NUM_PROBES - number) * first + number * own
        regions: Float[np.ndarray, "t r d"] = (mixed / np.linalg.norm(mixed, axis=2, keepdims=True)).astype(np.float32)
        return regions

    def _store(self, features: str) -> RegionStore:
        if self._opened is None or self._opened.name != features:
            self._opened = RegionStore(files.join(self.store, features), self.cache_bytes)
        return self._opened

    @cached_property
    def _trained_on(self) -> str | None:
        """The set of features that the student knows; None when nothing was trained."""
        if self.path is None:
            return None
        try:
            return str(json.loads(self._read(CONFIG))["features"])
        except _UNREADABLE as error:
            raise self._broken(CONFIG, error) from error

    @cached_property
    def _network(self) -> Network:
        """On the CPU until `load`."""
        if self.path is None:
            return RAW[self.kind or ""]()
        try:
            student = load_similarity(self.path)
        except _UNREADABLE as error:
            raise self._broken(WEIGHTS, error) from error
        if not isinstance(student, SimilarityStudent):
            action = "name the export of a fine or a coarse student"
            raise TeacherError(f"{type(student).__name__} scores no pairs of videos by itself", where=self.path, action=action)
        return student.requires_grad_(False)

    def _read(self, name: str) -> bytes:
        try:
            return files.read(files.join(self.path or "", name))
        except FileNotFoundError as error:
            raise self._broken(name, error) from error

    def _broken(self, name: str, error: Exception) -> TeacherError:
        what = f"the student cannot be loaded: {type(error).__name__}: {error}"
        return TeacherError(what, where=files.join(self.path or "", name), action="name the folder of an exported similarity student")


class Kept:
    """Tensors by name, made when asked for; while they need more than `max_bytes`, those not asked for the longest time go."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._tensors: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name in self._tensors:
            self._tensors.move_to_end(name)
            return self._tensors[name]
        made = make()
        self._tensors[name] = made
        self.num_bytes += made.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._tensors.popitem(last=False)[1].nbytes
        return made
