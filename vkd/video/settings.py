"""What a decoding child does, and what it may take; travels to it as JSON."""

from __future__ import annotations

import json
import mmap
from dataclasses import asdict, dataclass, replace

import numpy as np

from vkd.clips import Clip, Sampling
from vkd.video.access import Access
from vkd.video.fetch import EVERYTHING

NUM_SLOTS = 4  # clips that the child may be ahead
CLOCK_BYTES = 64  # before the slots: the two float64 of the child's METER.clock
MAX_DEADLINE_S = 3600.0
MIN_MEMORY_BYTES = 512 << 20  # Python and the decoders themselves
OUT_OF_MEMORY = 12  # the child's exit code
Views = list[np.ndarray]  # one array a sampling: uint8 [num_frames, size, size, 3]


@dataclass(frozen=True)
class Limits:
    """What decoding one video may take: seconds (waiting for storage not counted), and private memory of the child."""

    deadline_s: float = 60.0
    deadline_s_per_video_s: float = 1.0
    max_memory_bytes: int = 4 << 30

    def of(self, clip: Clip) -> float:
        """The deadline of one clip in seconds: longer when it ends late in its video."""
        return min(self.deadline_s + self.deadline_s_per_video_s * max(clip.end_s or 0.0, 0.0), MAX_DEADLINE_S)


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Settings:
    """What one child does: the samplings that it cuts from every clip, with which decoder, from where, within what limits."""

    samplings: tuple[Sampling, ...] = ()
    backend: str = "auto"
    access: Access = EVERYTHING
    limits: Limits = DEFAULT_LIMITS

    @property
    def num_tries(self) -> int:
        return 2 if self.backend == "auto" else 1

    @property
    def slot_bytes(self) -> int:
        return sum(s.num_frames * s.size_px**2 * 3 for s in self.samplings)

    def views_of(self, memory: memoryview | mmap.mmap, slot: int) -> Views:
        """The arrays of one slot of the shared memory."""
        offset, views = CLOCK_BYTES + slot * self.slot_bytes, []
        for s in self.samplings:
            shape = (s.num_frames, s.size_px, s.size_px, 3)
            views.append(np.frombuffer(memory, np.uint8, int(np.prod(shape)), offset).reshape(shape))
            offset += views[-1].nbytes
        return views

    def share(self, processes: int) -> Settings:
        """The same for one of several processes, which together keep to `max_requests_per_s`."""
        rate = self.access.max_requests_per_s
        return self if rate is None else replace(self, access=replace(self.access, max_requests_per_s=rate / processes))

    def to_json(self) -> str:
        plain = {"samplings": [s.model_dump() for s in self.samplings], "backend": self.backend}
        return json.dumps(plain | {"access": asdict(self.access), "limits": asdict(self.limits)})

    @classmethod
    def from_json(cls, text: str) -> Settings:
        told = json.loads(text)
        access = Access(**told["access"] | {"allow": None if told["access"]["allow"] is None else tuple(told["access"]["allow"])})
        return cls(tuple(Sampling(**s) for s in told["samplings"]), told["backend"], access, Limits(**told["limits"]))
