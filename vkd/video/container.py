"""The clock of one open video: times of packets and frames, seeking, and how far the file really reaches.

Works on objects that PyAV made; imports no decoder. Times are in seconds from the first presented frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from vkd.errors import VideoError

EPSILON_S = 1e-6
TRUNCATED_S = 0.5  # a header may promise this much more than the file holds
MAX_SIDE_PX, MAX_FRAME_PX = 8192, 2**26
MAX_PTS = 2**62


@dataclass(frozen=True)
class VideoInfo:
    """What a header says of a video. Width and height are those shown, after the rotation (clockwise: 0, 90, 180, 270)."""

    duration_s: float | None
    fps: float | None
    width_px: int
    height_px: int
    codec: str
    rotation_degrees: int
    num_frames: int | None


class Video:
    """An open PyAV container, its video stream, and the error that PyAV raises."""

    def __init__(self, container: Any, stream: Any, uri: str, decoder_error: type[Exception]) -> None:
        self.container, self.stream, self.uri, self.decoder_error = container, stream, uri, decoder_error
        if not stream.time_base:
            raise VideoError("decode_error", "the video stream has no time base", where=uri)
        self.tick_s = float(stream.time_base)
        self.damage = ""  # the decoder's words about the place where reading stopped before the end
        first = next((p for p in container.demux(stream) if pts_of(p) is not None and not p.is_discard), None)
        if first is None:
            raise VideoError("truncated", "the video stream has no packets", where=uri)
        self.origin_pts: int = pts_of(first) or 0
        self.declared_s = self._declared_s()

    def start_s(self, packet_or_frame: Any) -> float:
        pts = pts_of(packet_or_frame)
        if pts is None:
            raise VideoError("decode_error", "the frames carry no times", where=self.uri)
        return (pts - self.origin_pts) * self.tick_s

    def end_s(self, packet_or_frame: Any) -> float:
        return self.start_s(packet_or_frame) + (packet_or_frame.duration or 0) * self.tick_s

    def seek(self, time_s: float) -> None:
        """To the keyframe at or before a time, as far as the container knows."""
        self.damage = ""
        target_pts = max(-MAX_PTS, min(self.origin_pts + round(time_s / self.tick_s), MAX_PTS))
        if time_s <= 0:
            # transport streams seek by decode time, which for the first frame lies before its presentation
            with suppress(self.decoder_error):
                self.container.seek(max(-MAX_PTS, target_pts - round(10 / self.tick_s)), stream=self.stream, backward=True)
                return
        self.container.seek(target_pts, stream=self.stream, backward=True)

    def packets(self) -> Iterator[Any]:
        """Packets from here on; a damaged place is the end, and is remembered."""
        try:
            yield from (packet for packet in self.container.demux(self.stream) if packet.size)
        except self.decoder_error as error:
            self.damage = told(error, self.uri)

    def frames(self) -> Iterator[Any]:
        """Decoded frames from here on; a damaged place is the end, after what the decoder still holds."""
        context = self.stream.codec_context
        try:
            for packet in self.packets():
                yield from (self.checked(frame) for frame in context.decode(packet))
        except self.decoder_error as error:
            self.damage = told(error, self.uri)
        with suppress(self.decoder_error):
            yield from (self.checked(frame) for frame in context.decode(None))

    def checked(self, frame: Any) -> Any:
        """The frame. Raises `too_large`: a stream may hold larger frames than its header says."""
        refuse_large(frame.width, frame.height, self.uri)
        return frame

    def frames_from(self, time_s: float) -> tuple[Iterator[Any], Any]:
        """Frames from the keyframe at or before a time on, and the first of them.

        Containers seek by decode time and decoders drop what they cannot complete, so a first frame may come too late: then
        the seek goes further back.
        """
        back_s = 0.0
        while True:
            from_s = max(time_s - back_s, 0.0)
            with suppress(self.decoder_error):
                self.seek(from_s)
                frames = self.frames()
                first = next(frames, None)
                if first is not None and (from_s == 0.0 or self.start_s(first) <= time_s + EPSILON_S):
                    return frames, first
            if from_s == 0.0:
                raise VideoError("truncated", self.damage or "no frame can be decoded", where=self.uri)
            back_s = max(1.0, 2 * back_s)

    def key_packet(self, time_s: float) -> Any:
        """The packet of the last keyframe at or before a time (the first one, before it)."""
        back_s = end_s = 0.0
        key: Any = None
        while key is None:
            from_s = max(time_s - back_s, 0.0)
            with suppress(self.decoder_error):
                self.seek(from_s)
            for packet in self.packets():
                start_s, end_s = self.start_s(packet), self.end_s(packet)
                if packet.is_keyframe and (start_s <= time_s + EPSILON_S or (from_s == 0.0 and key is None)):
                    key = packet
                if key is not None and start_s >= time_s - EPSILON_S:
                    return key
                if start_s > time_s + EPSILON_S:
                    break
            if key is None and from_s == 0.0:
                raise VideoError("truncated", self.damage or "no keyframe can be read", where=self.uri)
            back_s = max(1.0, 2 * back_s)
        if time_s >= end_s:
            self.refuse_beyond(end_s)
        return key

    def duration_s(self) -> float:
        """What the header says, else the end of the last packet."""
        if self.declared_s is not None:
            return self.declared_s
        self.seek(0.0)
        return max((self.end_s(packet) for packet in self.packets()), default=0.0)

    def index_keys_s(self) -> tuple[Float[np.ndarray, " keys"], float]:
        """Times (decode times, for mp4) of the keyframes in the container's own index, and how far that index reaches."""
        entries = [((e.timestamp - self.origin_pts) * self.tick_s, e.is_keyframe) for e in self.stream.index_entries]
        return np.array([time_s for time_s, is_key in entries if is_key]), max((time_s for time_s, _ in entries), default=0.0)

    def refuse_beyond(self, last_end_s: float) -> None:
        """Raises `truncated` when frames should follow the last one that could be read."""
        if self.damage:
            raise VideoError("truncated", self.damage, where=self.uri)
        promised_s = (self.declared_s or 0.0) - TRUNCATED_S
        if promised_s > last_end_s and not self._sound_reaches(promised_s, last_end_s):
            raise VideoError("truncated", f"the header says {self.declared_s:.2f} s, frames end at {last_end_s:.2f} s", where=self.uri)

    def _sound_reaches(self, time_s: float, from_s: float) -> bool:
        """Whether another stream goes on: then the file is whole, and its picture just ends earlier than its sound."""
        with suppress(self.decoder_error):
            self.seek(from_s)
            origin_s = self.origin_pts * self.tick_s
            packets = (p for p in self.container.demux() if p.pts is not None)
            return any(float((p.pts + (p.duration or 0)) * p.time_base) - origin_s >= time_s for p in packets)
        return False

    def _declared_s(self) -> float | None:
        origin_s = self.origin_pts * self.tick_s
        clock = re.match(r"(\d+):(\d+):(\d+\.?\d*)", self.stream.metadata.get("DURATION", ""))  # Matroska, counted from zero
        if self.stream.duration:
            return float(self.stream.duration * self.tick_s)
        if clock:
            return float(clock[1]) * 3600 + float(clock[2]) * 60 + float(clock[3]) - origin_s
        if self.container.duration:
            return float(self.container.duration / 1e6) - (origin_s if "matroska" in self.container.format.name else 0.0)
        return None


def pts_of(packet_or_frame: Any) -> int | None:
    pts: int | None = packet_or_frame.dts if packet_or_frame.pts is None else packet_or_frame.pts
    return pts


def refuse_large(width_px: int, height_px: int, uri: str) -> None:
    """Raises `too_large` for frames that nobody films and that would fill the memory."""
    if max(width_px, height_px) > MAX_SIDE_PX or width_px * height_px > MAX_FRAME_PX:
        raise VideoError("too_large", f"frames of {width_px} x {height_px} px", where=uri)


def told(error: BaseException, uri: str) -> str:
    """The decoder's words of damage. Raises `out_of_memory` when the file may be whole."""
    if isinstance(error, MemoryError):
        raise VideoError("out_of_memory", words(error), where=uri) from error
    return words(error)


def words(error: BaseException) -> str:
    """The decoder's own words, short: without paths, clock times and decord's C++ stack trace."""
    first_line = str(getattr(error, "strerror", None) or error).split("\n", 1)[0]
    text = re.sub(r"\[[^]]*\] *|/\S+:\d+: ", "", first_line)
    return f"{type(error).__name__}: {text[:160]}"
