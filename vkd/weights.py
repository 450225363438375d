"""Published state dicts: read from files of two kinds, and loaded only where they fit exactly."""

from __future__ import annotations

import argparse
import io
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vkd.errors import TeacherError

# what reading raises on truncated files and flipped bytes, tried with 600 of them
_DAMAGED = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)
_COUNTER = "num_batches_tracked"  # of a BatchNorm: older files lack it, and inference does not use it


def named(path: str) -> Path:
    """The file that an option `weights` names. Raises TeacherError when there is none."""
    if not Path(path).is_file():
        action = "mend weights in the run file, or leave it out"
        raise TeacherError("the weights are not there: no such file", where=path, action=action)
    return Path(path)


def tensors(data: bytes) -> Any:
    """What a safetensors file, or one that `torch.save` wrote, holds. Raises ValueError when it is neither, or damaged."""
    try:
        if data[8:9] == b"{":
            return safetensors.torch.load(data)
        with torch.serialization.safe_globals([argparse.Namespace]):  # many checkpoints keep the options of their training
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise ValueError(type(error).__name__) from error


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a state dict that fits exactly. Raises TeacherError with the first key that is missing, unexpected or misshapen."""
    action = "name a checkpoint of this very network, or reinstall the package that carries it"
    try:
        state = tensors(path.read_bytes())
    except ValueError as error:
        raise TeacherError(f"cannot be read as a state dict: {error}", where=path.name, action=action) from error
    if not isinstance(state, Mapping):
        raise TeacherError(f"holds a {type(state).__name__}, not a state dict", where=path.name, action=action)
    expected = network.state_dict()
    for key in [*expected, *state]:
        if key not in state and not key.endswith(_COUNTER):
            raise TeacherError(f"the key {key!r} is missing", where=path.name, action=action)
        if key not in expected:
            raise TeacherError(f"the key {key!r} is unexpected", where=path.name, action=action)
        found = state.get(key, expected[key])
        if not isinstance(found, Tensor):
            raise TeacherError(f"the key {key!r} is a {type(found).__name__}, not a tensor", where=path.name, action=action)
        if found.shape != expected[key].shape:
            shapes = f"{tuple(found.shape)}, expected {tuple(expected[key].shape)}"
            raise TeacherError(f"the key {key!r} has shape {shapes}", where=path.name, action=action)
    network.load_state_dict(expected | dict(state))
