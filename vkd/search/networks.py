"""The three networks of a search, and what they make of one video: the same for a video that is indexed and for a query."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import nn

from vkd.checkpoint import CONFIG, WEIGHTS, load_similarity, read_export
from vkd.errors import ConfigError, LabelsMismatch
from vkd.recipes.dns.batches import COARSE, TEACHER
from vkd.regions import tiled
from vkd.search import packed
from vkd.store import files
from vkd.students.coarse import CoarseStudent
from vkd.students.selector import Selector
from vkd.students.visil import FineStudent

PARTS = ("coarse", "fine", "selector")
Network = TypeVar("Network", bound=nn.Module)


class Codes(NamedTuple):
    """What is stored of a video: a unit vector, the selector's number, and uint8 [t, r, bits / 8] or float16 [t, r, d]."""

    coarse: Float[np.ndarray, " o"]
    selector: float
    fine: Shaped[np.ndarray, "t r w"]


@dataclass(frozen=True)
class Networks:
    """Networks in eval mode on the CPU; `files` are their exports, each part's in a folder of its name."""

    coarse: CoarseStudent
    fine: FineStudent
    selector: Selector
    features: str  # the set of region features that all were trained on
    files: Mapping[str, bytes]

    @classmethod
    def load(cls, folders: Mapping[str, str]) -> Networks:
        """From export folders by part. Raises LabelsMismatch when trained on different features, ConfigError for other networks."""
        sets = {part: _features(folders[part]) for part in PARTS}
        for part in PARTS:
            if sets[part] != sets["coarse"]:
                what = f"was trained on {sets[part]}, the coarse student on {sets['coarse']}"
                raise LabelsMismatch(what, where=folders[part], action="train both on the same features")
        _require_selector_of(folders)
        return cls(
            _as(CoarseStudent, load_similarity(folders["coarse"]), folders["coarse"]),
            _as(FineStudent, load_similarity(folders["fine"]), folders["fine"]),
            _as(Selector, load_similarity(folders["selector"]), folders["selector"]),
            sets["coarse"],
            {f"{part}/{name}": files.read(files.join(folders[part], name)) for part in PARTS for name in (CONFIG, WEIGHTS)},
        )

    @classmethod
    def beside(cls, index_uri: str) -> Networks:
        """Those that lie in an index's folder."""
        return cls.load({part: files.join(index_uri, part) for part in PARTS})

    def __post_init__(self) -> None:
        # a convolution over a map whose channels come last takes a third of the time; results differ by rounding
        self.fine.comparator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def digests(self) -> dict[str, str]:
        """Of each exported file, by part and name."""
        return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in sorted(self.files.items())}

    @property
    def encoding(self) -> str:
        """How fine codes are stored: bits, or half precision."""
        return "bits" if self.fine.num_bits > 1 else "fp16"

    @torch.inference_mode()
    def index(self, regions: Float[np.ndarray, "t r d"]) -> Codes:
        """The codes of one video of at least one frame; a short one is repeated until it has four."""
        x = tiled(torch.from_numpy(np.asarray(regions, np.float32)))[None]
        fine = self.fine.index(x)[0]
        stored = packed.pack(fine) if self.encoding == "bits" else fine.numpy().astype(np.float16)
        return Codes(self.coarse.index(x)[0].numpy(), float(self.selector.index(x)), stored)


def _features(folder: str) -> str:
    """The set of region features that an exported network was trained on."""
    config, spec = read_export(folder)
    if not isinstance(config.get("features"), str):
        what = f"{spec.name!r} was trained on no region features"
        raise ConfigError(what, where=folder, action="name the student/ folder of a run of recipe dns")
    return str(config["features"])


def _require_selector_of(folders: Mapping[str, str]) -> None:
    """Raises LabelsMismatch when the selector learned where other students than these differ: it would send the wrong pairs."""
    config, _ = read_export(folders["selector"])
    for part, alias in (("coarse", COARSE), ("fine", TEACHER)):
        learned_from = config.get(f"{alias}_{WEIGHTS}")
        if learned_from not in (None, hashlib.sha256(files.read(files.join(folders[part], WEIGHTS))).hexdigest()):
            what = f"learned where another {part} student is wrong than that of {folders[part]}"
            raise LabelsMismatch(
                what, where=folders["selector"], action="name the students that it was trained with, or train it for these"
            )


def _as(kind: type[Network], found: Any, folder: str) -> Network:
    if not isinstance(found, kind):
        what = f"holds a {type(found).__name__}, not a {kind.__name__}"
        raise ConfigError(what, where=folder, action="name the student/ folder of the run that trained it")
    return found
