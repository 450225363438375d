"""A frozen teacher inside the process that trains, for what no label can carry: its maps, and going on from a student's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vkd.clips import Sampling
from vkd.errors import ConfigError
from vkd.models import ModelSpec, build
from vkd.schema import FRAMES
from vkd.stage_maps import stage_maps
from vkd.students.base import Student
from vkd.teachers import TEACHERS
from vkd.teachers.base import Teacher

LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (  # of the part that a map [b c t h w] is the output of
    lambda x: x,
    lambda x: x.transpose(1, 2),  # [b t c h w]
    lambda x: x.transpose(1, 2).flatten(0, 1),  # [(b t) c h w]
    lambda x: x.flatten(2).transpose(1, 2),  # [b n c]
)
OF_STUDENT = ("num_frames", "size_px")  # options that every student has
CLOSE = 1e-3  # of the largest logit


class LiveTeacher:
    """The maps of a teacher's stages for the frames that the student sees.

    It is no module: no optimizer, checkpoint, export or DistributedDataParallel knows it, and nothing changes its mode. It is
    loaded on the CPU, and again on another device when frames come from there.
    """

    teacher: Teacher

    def __init__(self, spec: ModelSpec, student: Student) -> None:
        torch.backends.cudnn.allow_tf32 = False  # as when labels are made: a teacher that declares fp32 must be fp32
        self._device = torch.device("cpu")
        with torch.random.fork_rng(devices=()):  # the student's random numbers are those that it has without this
            self.teacher = build(spec, TEACHERS, "teacher")
            _check_frames(self.teacher.sampling, student.sampling)
            self._load()
            self.shapes = [tuple(x.shape[1:]) for x in self.maps(self.probe())]  # [c, t, h, w] of each stage

    @torch.no_grad()
    def maps(self, frames: UInt8[Tensor, "b t s s 3"]) -> list[Float[Tensor, "b _ _ _ _"]]:
        """The maps of its stages, in its own precision. Raises ConfigError when it gives none."""
        self.move_to(frames.device)
        with torch.autocast(frames.device.type, enabled=False):
            return self.teacher.maps(frames)

    def move_to(self, device: torch.device) -> None:
        """Be where frames are."""
        if device != self._device:
            self._device = device
            with torch.random.fork_rng(devices=()):
                self._load()

    def probe(self) -> UInt8[Tensor, "1 t s s 3"]:
        """The teacher's synthetic clip, on the CPU."""
        return torch.from_numpy(self.teacher.probe_batch()[FRAMES])

    def _load(self) -> None:
        self.teacher.load(str(self._device))
        self.teacher.module.eval().requires_grad_(False)


class Chain:
    """A live teacher whose later stages go on from another's map. Raises ConfigError for one whose stages are no chain."""

    def __init__(self, live: LiveTeacher) -> None:
        self.live, teacher, frames = live, live.teacher, live.probe()
        self.names, maps = teacher.stage_names, live.maps(frames)
        with torch.no_grad():
            outputs, logits = stage_maps(teacher.module, self.names, lambda: teacher.logits_from(frames, {}))
            self._shapes = [tuple(x.shape) for x in outputs]  # of one clip
            self._layouts = [_layout(x, output) for x, output in zip(maps, outputs, strict=True)]
            for stage, x in enumerate(maps):
                if (self.logits(stage, x, torch.zeros_like(frames)) - logits).abs().max() > CLOSE * logits.abs().max():
                    raise _no_chain(self.names[stage])

    def logits(self, stage: int, stage_map: Float[Tensor, "b c t h w"], frames: UInt8[Tensor, "b t s s 3"]) -> Float[Tensor, "b n"]:
        """The teacher's logits when one of its stages gives this map; the gradient goes through all that comes after it.

        Of the stages before it nothing is used, so they do not run; of the frames, only their number matters.
        """
        self.live.move_to(frames.device)
        nothing = torch.zeros(1, device=frames.device)
        outputs = {name: nothing.expand(len(frames) * n, *rest) for name, (n, *rest) in zip(self.names[:stage], self._shapes, strict=False)}
        outputs[self.names[stage]] = self._layouts[stage](stage_map)
        with torch.autocast(frames.device.type, enabled=False):
            return self.live.teacher.logits_from(frames, outputs)


def refuse_offline(what: str, live: bool) -> None:
    """Raises ConfigError when `what`, a key of the recipe that needs the teacher's maps, is to learn from labels alone."""
    if not live:
        told = f"{what} cannot learn offline: the teacher's full maps are in no label"
        raise ConfigError(told, where=f"recipe.{what}", action="set recipe.live: true")


def _check_frames(teacher: Sampling | None, student: Sampling) -> None:
    if teacher is None:
        raise ConfigError("the teacher reads no frames, and so gives no maps", where="recipe.live", action="set recipe.live=false")
    differ = [name for name in Sampling.model_fields if getattr(teacher, name) != getattr(student, name)]
    if differ:
        asked = ", ".join(f"{name} {getattr(teacher, name)} (the student: {getattr(student, name)})" for name in differ)
        what = f"a live teacher sees the student's frames, and this one asks for {asked}"
        options = [
            f"recipe.student.{name}={getattr(teacher, name)}" if name in OF_STUDENT else f"recipe.teacher.{name}={getattr(student, name)}"
            for name in differ
        ]
        action = f"set {', '.join(options)} where there is such an option, or recipe.live=false"
        raise ConfigError(what, where="recipe.live", action=action)


def _layout(stage_map: Tensor, output: Tensor) -> Callable[[Tensor], Tensor]:
    for layout in LAYOUTS:
        if layout(stage_map).shape == output.shape and torch.allclose(layout(stage_map), output):
            return layout
    raise ConfigError(
        f"no known way back from a map to an output of shape {list(output.shape)}",
        where="recipe.teacher.substages",
        action="name other parts, or set recipe.combos.stitch: false",
    )


def _no_chain(name: str) -> ConfigError:
    action = "name other parts in recipe.teacher.substages, or set recipe.combos.stitch: false"
    return ConfigError(f"what the teacher does after {name!r} does not depend on that part alone", where="recipe.teacher", action=action)
