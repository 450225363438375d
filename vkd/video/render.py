"""Copies of videos as files: a small version of each source, and from it and its hosts' the frames of each copy, encoded one by one.

Small versions and copies are mp4 (h264), made in memory and put under their names whole. Frame n shows the source at n / fps seconds.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vkd.clips import Clip, Sampling, View
from vkd.copies import Copies, Copy, Recompression
from vkd.errors import VideoError
from vkd.store import files
from vkd.video.access import Access
from vkd.video.container import VideoInfo
from vkd.video.edits import Edit, Frame, edit_of, fitted
from vkd.video.guard import Guard
from vkd.video.settings import Settings

Frames = UInt8[np.ndarray, "time height width 3"]

CRF, SMALL_CRF = 23, 12  # x264's own default, and one whose losses are not seen
MADE_S = 946684800  # a file made again has the same time, as it has the same bytes: manifests then know it


@dataclass(frozen=True)
class Shrinking:
    """A source to be made small: its uri, what its header says, how the result's uri begins, and what may be read."""

    uri: str
    info: VideoInfo
    target: str
    how: Copies
    access: Access


@dataclass(frozen=True)
class Rendering:
    """The copies of one source that lack: each with its uri, and the uris of small versions by source."""

    copies: tuple[tuple[Copy, str], ...]
    small: dict[str, str]
    fps: float


def shrink(job: Shrinking) -> VideoError | None:
    """Write the small version of a source as `<target>-<frames>.mp4`, or say why it cannot be decoded."""
    how, info = job.how, job.info
    num_frames = max(1, min(int((info.duration_s or 0.0) * how.fps), how.max_frames))
    scale = min(1.0, how.side_px / min(info.width_px, info.height_px))
    size_px = (max(16, round(info.width_px * scale)), max(16, round(info.height_px * scale)))
    # decoding gives squares: the longer side is as it must be, the other one is made so below
    sampling = Sampling(num_frames=num_frames, size_px=max(size_px), mode="fps", fps=how.fps)
    guard = Guard(Settings((sampling,), access=job.access))
    try:
        (views,) = guard.decode([Clip(job.uri, 0.0, info.duration_s, View("frame"), "")])
    finally:
        guard.close()
    if isinstance(views, VideoError):
        return views
    frames = (np.asarray(Image.fromarray(frame).resize(size_px, Image.Resampling.BILINEAR)) for frame in views[0])
    files.put(f"{job.target}-{num_frames}.mp4", encode(frames, how.fps, SMALL_CRF))
    return None


def render(job: Rendering) -> None:
    """Write copies of one source; of the hosts only one is in memory at a time."""
    frames: Frames | None = None
    for copy, target in job.copies:
        frames = read(job.small[copy.source]) if frames is None else frames
        host = frames[:0] if copy.host is None else read(job.small[copy.host])
        crf = copy.look.crf if isinstance(copy.look, Recompression) else CRF
        files.put(target, encode(_shown(copy, frames, host), job.fps, crf), changed_s=MADE_S)


def _shown(copy: Copy, frames: Frames, host: Frames) -> Iterator[Frame]:
    """The frames of a copy; those of a partial one have the size of its host."""
    edit: Edit = edit_of(copy.look, (frames.shape[2], frames.shape[1]))
    for number, index in enumerate(copy.shown):
        if index < 0:
            yield host[~index]
        else:
            edited = edit(frames[index], number)
            yield edited if copy.host is None else fitted(edited, (host.shape[2], host.shape[1]))


def encode(frames: Iterable[Frame], fps: float, crf: int) -> bytes:
    """Frames of one size as mp4; an odd last row or column is left out. The same frames give the same bytes."""
    import av

    stored, waiting = io.BytesIO(), iter(frames)
    first = next(waiting)
    height_px, width_px = (side_px // 2 * 2 for side_px in first.shape[:2])
    with av.open(stored, "w", format="mp4") as container:
        options = {"preset": "veryfast", "crf": str(crf), "bf": "0", "g": str(max(1, round(2 * fps)))}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, "yuv420p"
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(chain([first], waiting)):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height_px, :width_px]), format="rgb24")
            picture = rgb.reformat(format="yuv420p", threads=1)  # how many cores there are must change nothing
            picture.pts, picture.time_base = number, 1 / stream.codec_context.framerate
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return stored.getvalue()


def read(uri: str) -> Frames:
    """All frames of a small version."""
    import av

    with av.open(io.BytesIO(files.read(uri))) as container:
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)])
