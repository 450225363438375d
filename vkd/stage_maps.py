"""The outputs of named parts of a network, taken while it runs, or given in their place."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar, overload

from jaxtyping import Float
from torch import Tensor, nn

from vkd.errors import ConfigError

KEY = "substages"  # of a teacher's or a student's options: where the names come from

Output = TypeVar("Output")


class _EnoughError(Exception):
    """Every wanted output is there: ends the forward."""


@overload
def stage_maps(network: nn.Module, names: Sequence[str], run: Callable[[], Output]) -> tuple[list[Tensor], Output]: ...
@overload
def stage_maps(
    network: nn.Module, names: Sequence[str], run: Callable[[], Output], num_stages: int | None
) -> tuple[list[Tensor], Output | None]: ...
def stage_maps(
    network: nn.Module, names: Sequence[str], run: Callable[[], Output], num_stages: int | None = None
) -> tuple[list[Tensor], Output | None]:
    """Outputs of the submodules `names` (dotted) while `run()` runs the network, in the order of the names, and what `run()` gives.

    With num_stages < len(names) only the first of them are taken, and nothing runs after they are there: then the second is
    None. Raises ConfigError for a name that is not there, that does not run, or whose output is no tensor.
    """
    if num_stages is not None and num_stages < 1:
        raise ValueError(f"num_stages is {num_stages}; it must be at least 1")
    known, wanted = _parts(network, names), list(names[:num_stages])
    parts, taken = {name: known[name] for name in wanted}, dict[str, Any]()

    def taking(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def take(_module: nn.Module, _inputs: Any, output: Any) -> None:
            taken[name] = output
            if len(wanted) < len(names) and len(taken) == len(parts):
                raise _EnoughError

        return take

    hooks = [part.register_forward_hook(taking(name)) for name, part in parts.items()]
    try:
        final = run()
    except _EnoughError:
        final = None
    finally:
        for hook in hooks:
            hook.remove()
    return [_tensor(taken.get(name), name) for name in wanted], final


@contextmanager
def replaced(network: nn.Module, outputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the submodules that `outputs` names (dotted) give these instead of running. Raises ConfigError for an unknown name."""
    parts = _parts(network, [*outputs])
    with ExitStack() as undo:
        for name, part in parts.items():
            before = vars(part).get("forward")  # of this object alone, as wrappers set it
            undo.callback(partial(setattr, part, "forward", before) if before is not None else partial(delattr, part, "forward"))
            object.__setattr__(part, "forward", partial(_given, outputs[name]))
        yield


def partners(num_stages: int, num_others: int) -> list[int]:
    """For each stage of a network the one of another network that lies as deep."""
    return [max(0, round((k + 1) * num_others / num_stages) - 1) for k in range(num_stages)]


def frames_as_map(output: Tensor, num_clips: int, num_frames: int) -> Float[Tensor, "b c t h w"]:
    """The map of clips whose frames a 2D part saw one by one: (clip, frame) is the first axis. Raises ConfigError for another shape."""
    if output.ndim != 4 or len(output) != num_clips * num_frames:
        raise no_map(output)
    return output.reshape(num_clips, num_frames, *output.shape[1:]).transpose(1, 2)


def no_map(output: Tensor) -> ConfigError:
    """The error that an output has no time, height and width."""
    what = f"an output of shape {list(output.shape)} is no map over time and space"
    return ConfigError(what, where=KEY, action="name parts that come before pooling")


def _parts(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    known = dict(network.named_modules())
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3) or [child for child, _ in network.named_children()]
            raise ConfigError(f"{type(network).__name__} has no part {name!r}", where=KEY, action=f"did you mean {', '.join(close)}?")
    return {name: known[name] for name in names}


def _given(output: Tensor, *_inputs: Any, **_options: Any) -> Tensor:
    return output


def _tensor(output: Any, name: str) -> Tensor:
    if not isinstance(output, Tensor):
        what = f"the part {name!r} " + ("does not run" if output is None else f"gives a {type(output).__name__}, not a tensor")
        raise ConfigError(what, where=KEY, action="name a part that gives one tensor")
    return output
