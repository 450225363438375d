"""Which frame is shown when: headers, exact and keyframe decoding. The only file that decodes what others made.

Time t is in seconds from the first presented frame; the frame shown at t is the last one that starts at or before t.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vkd.clips import MAX_DURATION_S, Clip, Sampling, View
from vkd.errors import ConfigError, VideoError
from vkd.video import fetch
from vkd.video.access import Access
from vkd.video.container import EPSILON_S, Video, VideoInfo, refuse_large, told, words

Frame = UInt8[np.ndarray, "height width 3"]

MAX_S_PER_BYTE = 1.0  # of a video that is longer than its file can tell of
BLIND_SEEK_S = 2.0  # without an index, a seek over less than this is not tried
# Playlists and scripts are left out: they would make FFmpeg open other files and hosts.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,obu,h264,hevc,m4v,gif,mxf,nut,rm,yuv4mpegpipe,mp3,wav,flac,aac"
DECORD_PACKAGES = ("decord", "decord2", "eva-decord")


def check_decoder() -> None:
    """Refuses an environment in which not exactly one package provides the module `decord`: two overwrite each other."""
    installed = [name for name in DECORD_PACKAGES if _is_installed(name)]
    if len(installed) > 1:
        action = f"pip uninstall {' '.join(installed)}, then pip install decord2"
        raise ConfigError(f"{' and '.join(installed)} overwrite each other's module decord", action=action)
    if not installed:
        raise ConfigError("no package provides the module decord", action="pip install decord2")


def probe(uri: str, access: Access = fetch.EVERYTHING) -> VideoInfo:
    """The header of a video, and of its first frame the rotation, which PyAV shows nowhere else."""
    with fetch.opened(uri, access) as source, _video(source, uri) as video:
        info = _info(video)
        _refuse_endless(info.duration_s, source, uri)
        return info


def probe_full(uri: str, access: Access = fetch.EVERYTHING) -> VideoInfo:
    """The same with the true number of frames and duration: decodes all of it. Raises `truncated` when not all is there."""
    with fetch.opened(uri, access) as source, _video(source, uri) as video:
        info, num_frames, end_s = _info(video), 0, 0.0
        _refuse_endless(info.duration_s, source, uri)
        video.seek(0.0)
        for frame in video.frames():
            num_frames, end_s = num_frames + 1, max(end_s, video.end_s(frame))
        video.refuse_beyond(end_s)
        return replace(info, num_frames=num_frames, duration_s=end_s)


def decode_clip(
    clip: Clip, samplings: Sequence[Sampling], backend: str = "auto", access: Access = fetch.EVERYTHING
) -> list[UInt8[np.ndarray, "num_frames size size 3"]]:
    """One array per sampling, all cut from one pass over the union of their timestamps; equal samplings share one array.

    `backend` is `decord`, `pyav`, or `auto`: decord, and PyAV for what decord cannot open or would seek wrongly.
    """
    if backend not in ("auto", "decord", "pyav"):
        raise ConfigError(f"unknown decoder {backend!r}", action="use one of auto, decord, pyav")
    _refuse_span(clip)
    with fetch.opened(clip.uri, access) as source, _video(source, clip.uri) as video:
        end_s = clip.end_s
        if end_s is None:
            _refuse_endless(end_s := video.duration_s(), source, clip.uri)
        times = {sampling: sampling.timestamps_s(clip.start_s, end_s, clip.key) for sampling in samplings}
        union = np.unique(np.concatenate(list(times.values()))) if times else np.zeros(0)
        # decord reads all of a file object into memory
        if backend == "pyav" or (backend == "auto" and not isinstance(source, str | io.BytesIO)):
            views = _resized(_pyav_frames(video, union, clip.view), union, times, clip.view)
        else:
            try:
                views = _resized(_decord_frames(video, source, union, clip.view), union, times, clip.view)
            except VideoError as error:
                if backend == "decord" or error.kind != "decode_error":
                    raise
                views = _resized(_pyav_frames(video, union, clip.view), union, times, clip.view)
    return [views[sampling] for sampling in samplings]


def _resized(
    frames: Iterator[Frame], union: Float[np.ndarray, " union"], times: dict[Sampling, Float[np.ndarray, " num_frames"]], view: View
) -> dict[Sampling, UInt8[np.ndarray, "num_frames size size 3"]]:
    """Crops, resizes and flips each frame as it comes: whole frames are never piled up."""
    rows = {sampling: np.searchsorted(union, times_s) for sampling, times_s in times.items()}
    views = {s: np.empty((s.num_frames, s.size_px, s.size_px, 3), np.uint8) for s in times}
    shown: Frame | None = None
    sizes: dict[tuple[int, str], Frame] = {}
    for position, frame in enumerate(frames):
        if frame is not shown:
            shown, sizes = frame, {}
        for sampling, positions in rows.items():
            here = positions == position
            if here.any():
                size = (sampling.size_px, sampling.resize)
                if size not in sizes:
                    sizes[size] = _resize(frame, view, *size)
                views[sampling][here] = sizes[size]
    return views


def _resize(frame: Frame, view: View, size_px: int, kernel: str) -> Frame:
    height_px, width_px = frame.shape[:2]
    left, top, right, bottom = view.box_px(width_px, height_px)
    box = (max(left, 0.0), max(top, 0.0), min(right, float(width_px)), min(bottom, float(height_px)))
    resample = Image.Resampling.BICUBIC if kernel == "bicubic" else Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(frame).resize((size_px, size_px), resample, box=box))
    return small[:, ::-1] if view.flip else small


@contextmanager
def _video(source: str | BinaryIO, uri: str) -> Iterator[Video]:
    """Opens a video and refuses, from the header alone, what cannot be decoded."""
    import av

    av.logging.set_level(av.logging.FATAL)  # damage is told by exceptions
    try:
        container = av.open(source, metadata_errors="ignore", container_options={"format_whitelist": CONTAINERS})
    except av.FFmpegError as error:
        raise VideoError("not_a_video", told(error, uri), where=uri) from error
    with container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise VideoError("no_video_stream", "the file has no video stream", where=uri)
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise VideoError("decode_error", "there is no decoder for its codec", where=uri)
        refuse_large(stream.codec_context.width, stream.codec_context.height, uri)
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        try:
            yield Video(container, stream, uri, av.FFmpegError)
        except av.FFmpegError as error:
            raise VideoError("decode_error", told(error, uri), where=uri) from error


def _refuse_span(clip: Clip) -> None:
    """Raises `bad_span` for a clip that no video has: a manifest may say anything."""
    if not all(abs(time_s) <= MAX_DURATION_S for time_s in (clip.start_s, clip.end_s or 0.0)):
        raise VideoError("bad_span", f"no video has a clip from {clip.start_s} to {clip.end_s} s", where=clip.uri)


def _refuse_endless(duration_s: float | None, source: str | BinaryIO, uri: str) -> None:
    """Raises `bad_duration`: who plans clips would take a header at its word, and make millions of a few bytes."""
    if isinstance(source, str):
        num_bytes = os.path.getsize(source)
    else:
        place = source.tell()  # PyAV's, who does not look again
        num_bytes = source.seek(0, os.SEEK_END)
        source.seek(place)
    if duration_s is not None and not -1.0 <= duration_s <= min(num_bytes * MAX_S_PER_BYTE, MAX_DURATION_S):
        raise VideoError("bad_duration", f"the header says {duration_s:.4g} s, the file has {num_bytes} bytes", where=uri)


def _info(video: Video) -> VideoInfo:
    video.seek(0.0)
    stream, frame = video.stream, next(video.frames(), None)
    if frame is None:
        raise VideoError("truncated", video.damage or "the first frame cannot be decoded", where=video.uri)
    turned = frame.rotation % 180 != 0
    width_px, height_px = (frame.height, frame.width) if turned else (frame.width, frame.height)
    rate = stream.average_rate or stream.guessed_rate
    fps, codec = float(rate) if rate else None, stream.codec_context.codec.canonical_name
    return VideoInfo(video.duration_s(), fps, width_px, height_px, codec, -frame.rotation % 360, stream.frames or None)


def _pyav_frames(video: Video, times_s: Float[np.ndarray, " times"], view: View) -> Iterator[Frame]:
    """The frame shown at each of the ascending times; a repeated frame is the same array."""
    image: Frame | None = None
    shown: Any = None
    for frame in _pyav_keyframes(video, times_s) if view.decoding == "keyframe" else _pyav_exact(video, times_s):
        if frame is not shown or image is None:
            # one thread: threads for each frame are made and waited for anew, which on a busy machine takes longer than decoding
            rgb = frame.to_ndarray(format="rgb24", threads=1)
            shown, image = frame, np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90))
        yield image


def _pyav_exact(video: Video, times_s: Float[np.ndarray, " times"]) -> Iterator[Any]:
    keys_s, index_end_s = video.index_keys_s()
    current: Any = None
    following: Any = None
    blind_seeks = True
    for time_s in times_s:
        gap_s = 0.0 if current is None else time_s - video.start_s(following or current)
        known = bool(len(keys_s)) and time_s <= index_end_s + 1.0
        key_between = known and bool(((keys_s > time_s - gap_s + EPSILON_S) & (keys_s <= time_s + EPSILON_S)).any())
        if current is None or key_between or (not known and blind_seeks and gap_s > BLIND_SEEK_S):
            before, current, following = current, None, None
            frames, current = video.frames_from(time_s)
            # no keyframe lay between: decoding on would have been cheaper, and would be the next time
            blind_seeks = before is None or video.start_s(current) > video.start_s(before)
        while video.start_s(current) < time_s - EPSILON_S:
            following = following or next(frames, None)
            if following is None and time_s >= video.end_s(current):
                video.refuse_beyond(video.end_s(current))
            if following is None or video.start_s(following) > time_s + EPSILON_S:
                break
            current, following = following, None
        yield current


def _pyav_keyframes(video: Video, times_s: Float[np.ndarray, " times"]) -> Iterator[Any]:
    frame = key_s = None
    for time_s in times_s:
        packet = video.key_packet(time_s)
        if frame is None or video.start_s(packet) != key_s:
            context = video.stream.codec_context
            context.flush_buffers()
            frames = context.decode(packet) + context.decode(None)
            if not frames:
                raise VideoError("truncated", "a keyframe cannot be decoded", where=video.uri)
            frame, key_s = video.checked(frames[0]), video.start_s(packet)
        yield frame


def _decord_frames(video: Video, source: str | BinaryIO, times_s: Float[np.ndarray, " times"], view: View) -> Iterator[Frame]:
    """The same by decord, which turns rotated video by itself. Raises `decode_error` where it fails or would seek wrongly."""
    starts_s, is_key = _decord_index(video, times_s)
    positions = np.maximum(np.searchsorted(starts_s, times_s + EPSILON_S, side="right") - 1, 0)
    if view.decoding == "keyframe":
        keys = np.flatnonzero(is_key)
        positions = keys[np.maximum(np.searchsorted(keys, positions, side="right") - 1, 0)]
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    reader = None
    try:
        # decord reads a file object from where it stands, which is PyAV's place
        data = io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else source
        reader = decord.VideoReader(data, ctx=decord.cpu(0), num_threads=1)
        if len(reader) != len(starts_s):
            raise VideoError("decode_error", f"decord counts {len(reader)} frames, PyAV {len(starts_s)}", where=video.uri)
        shown, frame = -1, np.zeros((0, 0, 3), np.uint8)
        for position in positions.tolist():
            if position != shown:
                shown, frame = position, _unpadded(reader[position].asnumpy(), video)
            yield frame
    except (decord.DECORDError, decord.DECORDLimitReachedError, IndexError, ValueError, AssertionError, StopIteration) as error:
        raise VideoError("decode_error", words(error), where=video.uri) from error
    finally:
        del reader  # it decodes ahead without limit


def _unpadded(frame: UInt8[np.ndarray, "height width channels"], video: Video) -> Frame:
    """decord takes the padding of narrow frames (96 px wide, for one) for a fourth channel: rows are right, their cut is not."""
    width_px, height_px = video.stream.codec_context.width, video.stream.codec_context.height
    if frame.shape[0] != height_px:
        width_px = height_px
    return frame.reshape(frame.shape[0], -1)[:, : 3 * width_px].reshape(frame.shape[0], width_px, 3)


def _decord_index(video: Video, times_s: Float[np.ndarray, " times"]) -> tuple[Float[np.ndarray, " frames"], np.ndarray]:
    """Start times and keyframe flags in presentation order.

    decord numbers frames by sorted pts, but keyframes by decode order, and counts frames that an edit list hides: where
    these differ (open GOPs, no pts, edit lists) or seeks are inexact (transport streams), it returns wrong frames silently.
    """
    video.seek(0.0)
    pts, keys, hidden, last_end_s = [], [], False, 0.0
    for packet in video.packets():
        pts.append(packet.pts)
        keys.append(packet.is_keyframe)
        hidden, last_end_s = hidden or packet.is_discard, max(last_end_s, video.end_s(packet))
    starts_s = np.array([np.nan if p is None else (p - video.origin_pts) * video.tick_s for p in pts])
    order, is_key = np.argsort(starts_s, kind="stable"), np.array(keys, bool)
    reasons = {
        "some packets have no time": bool(np.isnan(starts_s).any()),
        "an edit list hides frames": hidden,
        "GOPs are open": not np.array_equal(np.flatnonzero(is_key), np.flatnonzero(is_key[order])),
        "the container has no index": video.container.format.name in ("mpegts", "mpeg"),
    }
    for reason in (text for text, holds in reasons.items() if holds):
        raise VideoError("decode_error", f"decord would seek wrongly: {reason}", where=video.uri)
    if len(times_s) and times_s[-1] >= last_end_s:
        video.refuse_beyond(last_end_s)
    return starts_s[order], is_key[order]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
