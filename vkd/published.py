"""Published weights of the similarity networks (DnS, ViSiL) as exports, so that they are indexed with, or teach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from vkd import checkpoint, planning, weights
from vkd.errors import ConfigError
from vkd.models import ModelSpec
from vkd.region_store import REGIONS
from vkd.run import Run
from vkd.store import files
from vkd.students import coarse, selector, visil

State = Mapping[str, Tensor]


class Published(NamedTuple):
    """How the reference's state dict is loaded, by which name vkd knows the network, and its options beside `num_dims`."""

    load: Callable[..., nn.Module]
    name: str
    options: Mapping[str, Any]


NETWORKS: Mapping[str, Published] = {
    "fine_attention": Published(visil.load_reference, "fine", {"kind": "attention"}),
    "fine_binary": Published(visil.load_reference, "fine", {"kind": "binary"}),
    "coarse": Published(coarse.load_reference, "coarse", {}),
    "selector": Published(selector.load_reference, "selector", {}),
    "visil": Published(visil.load_reference_head, "visil", {}),
    "visil_symmetric": Published(visil.load_reference_head, "visil", {"symmetric": True}),
}


def adopt(run: Run, path: str, network: str, out: str) -> dict[str, Any]:
    """Write the export of a checkpoint for the region features of the run's first teacher; what is told of it.

    Nobody can tell whether the weights were trained on these very features: backbone, its weights and whitening must be those of their
    authors. Raises ConfigError for an unknown network, weights of another one, or features of another size.
    """
    if network not in NETWORKS:
        raise ConfigError(f"{network!r} is no network", where="--network", action=f"choose {', '.join(NETWORKS)}")
    alias, teacher = planning.first_teacher(run)
    if REGIONS not in teacher.emits:
        what = f"it emits no {REGIONS!r}, but {', '.join(teacher.emits)}"
        raise ConfigError(what, where=f"recipe.{alias}", action="name a run whose first teacher is `regions`")
    published, state = NETWORKS[network], _state(path)
    options = {**published.options, "num_dims": teacher.emits[REGIONS].row_shape[-1]}
    if "binarization.W" in state and network == "fine_binary":
        options["num_bits"] = state["binarization.W"].shape[-1]
    try:
        loaded = published.load(state, **options)
    except ConfigError as error:
        where = f"{path}, for features of {options['num_dims']} dimensions"
        raise ConfigError(error.what, where=where, action="name another --network, or a run of its features") from error
    features = planning.teacher_spec(run, alias, teacher).name
    checkpoint.export(loaded.float(), ModelSpec(name=published.name, options=options), out, {"features": features})
    return {"export": out, "network": network, "features": features, "parameters": sum(p.numel() for p in loaded.parameters())}


def _state(path: str) -> State:
    """The state dict in a checkpoint, which is its `model`, or the file itself. Raises ConfigError when there is none."""
    action = "name the checkpoint as its authors publish it"
    try:
        found = weights.tensors(files.read(path))
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=path, action=action) from error
    except ValueError as error:
        raise ConfigError(f"cannot be read as a checkpoint: {error}", where=path, action=action) from error
    state = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError("holds no state dict", where=path, action=action)
    return state
