"""Both decoders show the right frame at the right time, and every kind of bad file has its name."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import clipmaker
import fsspec
import numpy as np
import pytest
from clipmaker import index_of, make_clip, make_sound, rotate_mp4
from PIL import Image

from vkd.clips import Clip, Sampling, View, ViewPolicy
from vkd.errors import ConfigError, StorageError, VideoError
from vkd.video import container, decode
from vkd.video.access import Access
from vkd.video.container import VideoInfo
from vkd.video.decode import decode_clip, probe, probe_full

WHOLE = View("frame")
BACKENDS = ("decord", "pyav", "auto")
CFR_S = np.arange(60) / 25
VFR_S = np.cumsum(np.random.default_rng(0).choice([0.02, 0.04, 0.2], 60))
B_FRAMES = {"bf": "3", "g": "20"}
OPEN_GOPS = {"bf": "3", "g": "20", "x264-params": "open-gop=1:b-adapt=0"}
VP9 = {"deadline": "realtime", "cpu-used": "8"}
# name: presentation times, arguments of make_clip, and whether decord can be trusted with it
CLIPS: dict[str, tuple[np.ndarray, dict[str, Any], bool]] = {
    "cfr.mp4": (CFR_S, {}, True),
    "vfr.mp4": (VFR_S, {}, True),
    "b_frames.mp4": (CFR_S, {"options": B_FRAMES}, True),
    "open_gops.mp4": (CFR_S, {"options": OPEN_GOPS}, False),
    "late_start.mp4": (CFR_S + 3, {"options": B_FRAMES}, True),
    "late_start_vfr.mkv": (VFR_S + 3, {"options": B_FRAMES}, True),
    "late_start.ts": (CFR_S + 3, {"options": B_FRAMES}, False),
    "long_gop.mp4": (CFR_S, {"options": {"bf": "3", "g": "250"}}, True),
    "fragments.mp4": (CFR_S, {"options": B_FRAMES, "container_options": {"movflags": "frag_keyframe+empty_moov"}}, True),
    "plain.avi": (CFR_S, {"codec": "mpeg4"}, True),
    "b_frames.flv": (CFR_S, {"options": B_FRAMES}, True),
    "no_duration.mkv": (CFR_S, {"options": B_FRAMES, "container_options": {"live": "1"}}, False),
    "no_duration.webm": (CFR_S, {"codec": "libvpx-vp9", "options": VP9, "container_options": {"live": "1"}}, False),
    "vp9.webm": (CFR_S, {"codec": "libvpx-vp9", "options": VP9}, True),
    "hevc.mp4": (CFR_S, {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=20"}}, False),
    "av1.mp4": (CFR_S, {"codec": "libsvtav1", "options": {"preset": "8", "crf": "10"}}, True),
}
# corpus clips that decord is not trusted with
DECORD_EXCEPTIONS = {
    "neardup/db/cloudy-sky.mp4": "an edit list hides frames",
    "neardup/db/swing.mp4": "an edit list hides frames",
}

RANGES = Access(max_inline_bytes=9)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    made = {name: c for name, c in CLIPS.items() if clipmaker.has_encoder(c[1].get("codec", "libx264"))}
    return {name: make_clip(folder / name, times_s, **given) for name, (times_s, given, _) in made.items()}


def indices(
    path: Path | str, sampling: Sampling, backend: str, view: View = WHOLE, span_s: tuple[float, float | None] = (0.0, None)
) -> list[int]:
    """The frame numbers that the decoded frames show."""
    (frames,) = decode_clip(Clip(str(path), *span_s, view, "key"), [sampling], backend)
    return [index_of(frame) for frame in frames]


def shown_at(presented_s: np.ndarray, times_s: Sequence[float] | np.ndarray) -> list[int]:
    """The oracle: the last frame presented at or before each time, by a plain search."""
    since_first_s = [p - presented_s[0] for p in presented_s]
    return [max([i for i, p in enumerate(since_first_s) if p <= t + 1e-6], default=0) for t in times_s]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLIPS)
def test_the_frame_shown_at_a_time_is_the_last_that_began(clips: dict[str, Path], name: str, backend: str) -> None:
    if name not in clips:
        pytest.skip(f"no encoder for {name}")
    presented_s, _, decord_is_right = CLIPS[name]
    duration_s = probe(str(clips[name])).duration_s
    assert duration_s == pytest.approx(presented_s[-1] - presented_s[0], abs=0.15)
    samplings = [Sampling(num_frames=n, size_px=64) for n in (2, 7, 60)] + [Sampling(num_frames=9, size_px=64, mode="segment_random")]
    for sampling in samplings:
        if backend == "decord" and not decord_is_right:
            with pytest.raises(VideoError, match=r"decord|DECORD"):
                indices(clips[name], sampling, backend)
        else:
            times_s = sampling.timestamps_s(0.0, duration_s, "key")
            assert indices(clips[name], sampling, backend) == shown_at(presented_s, times_s)


@pytest.mark.parametrize("name", CLIPS)
def test_keyframe_policy_shows_the_last_keyframe(clips: dict[str, Path], name: str) -> None:
    if name not in clips:
        pytest.skip(f"no encoder for {name}")
    exact = indices(clips[name], Sampling(num_frames=60, size_px=64), "auto")
    per_backend = [
        indices(clips[name], Sampling(num_frames=60, size_px=64), backend, View("frame", decoding="keyframe"))
        for backend in BACKENDS
        if backend != "decord" or CLIPS[name][2]
    ]
    keyframes = per_backend[0]
    assert all(other == keyframes for other in per_backend)
    every = {
        "cfr.mp4": 10,
        "vfr.mp4": 10,
        "b_frames.mp4": 20,
        "open_gops.mp4": 20,
        "late_start.mp4": 20,
        "long_gop.mp4": 60,
        "hevc.mp4": 20,
    }
    if name in every:
        assert keyframes == [index // every[name] * every[name] for index in exact]
    assert all(key <= index for key, index in zip(keyframes, exact, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_times_before_and_after_the_video_show_its_ends(clips: dict[str, Path], backend: str) -> None:
    assert indices(clips["b_frames.mp4"], Sampling(num_frames=3, size_px=64), backend, span_s=(-9.0, -1.0)) == [0, 0, 0]
    assert indices(clips["b_frames.mp4"], Sampling(num_frames=3, size_px=64), backend, span_s=(50.0, 60.0)) == [59, 59, 59]


def test_sparse_timestamps_seek_and_close_ones_decode_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_clip(tmp_path / "long.mp4", np.arange(250) / 25, options={"g": "10"})
    seeks: list[float] = []
    plain = decode.Video.seek
    monkeypatch.setattr(decode.Video, "seek", lambda video, time_s: (seeks.append(time_s), plain(video, time_s))[1])
    assert indices(path, Sampling(num_frames=5, size_px=64), "pyav") == [25, 75, 125, 175, 225]
    assert len(seeks) == 5
    seeks.clear()
    assert indices(path, Sampling(num_frames=5, size_px=64), "pyav", span_s=(4.0, 4.2)) == [100, 101, 102, 103, 104]
    assert len(seeks) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_video_is_turned_upright(tmp_path: Path, backend: str, degrees: int) -> None:
    path = make_clip(tmp_path / "phone.mp4", CFR_S)
    rotate_mp4(path, degrees)
    info = probe(str(path))
    assert info.rotation_degrees == degrees
    assert (info.width_px, info.height_px) == ((96, 64) if degrees == 180 else (64, 96))
    (frames,) = decode_clip(Clip(str(path), 0.0, None, View("frame"), "key"), [Sampling(num_frames=6, size_px=64)], backend)
    lying = np.rot90(frames, degrees // 90, axes=(1, 2))
    assert [index_of(frame) for frame in lying] == [5, 15, 25, 35, 45, 55]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width_px", [48, 64, 90, 96, 100, 128, 130])
def test_narrow_frames_are_not_sheared(tmp_path: Path, backend: str, width_px: int) -> None:
    path = make_clip(tmp_path / "narrow.mp4", CFR_S[:20], size_px=(width_px, 64), options={"qp": "20"})
    assert indices(path, Sampling(num_frames=20, size_px=64), backend) == list(range(20))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_samplings_at_once_equal_two_decodes(clips: dict[str, Path], backend: str) -> None:
    view = ViewPolicy(min_scale=0.3).view("example", 3)
    clip = Clip(str(clips["vfr.mp4"]), 0.5, 2.5, view, "key")
    small, large = Sampling(num_frames=5, size_px=24), Sampling(num_frames=8, size_px=40, resize="bicubic")
    both = decode_clip(clip, [small, large, small], backend)
    assert both[0] is both[2]
    for sampling, array in zip((small, large), both[:2], strict=True):
        assert (array.shape, array.dtype) == ((sampling.num_frames, sampling.size_px, sampling.size_px, 3), np.uint8)
        np.testing.assert_array_equal(array, decode_clip(clip, [sampling], backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_crop_resize_and_flip_are_pillows(clips_dir: Path, backend: str) -> None:
    path, box = str(clips_dir / "carphone_pristine.mp4"), (0.1, 0.2, 0.65, 0.75)
    plain = decode_clip(Clip(path, 1.0, 2.0, View("frame"), "key"), [Sampling(num_frames=1, size_px=176)], backend)[0][0]
    flipped = decode_clip(Clip(path, 1.0, 2.0, View("frame", flip=True), "key"), [Sampling(num_frames=1, size_px=176)], backend)[0][0]
    np.testing.assert_array_equal(flipped, plain[:, ::-1])
    view = View("square", box, flip=True)
    cropped = decode_clip(Clip(path, 1.0, 2.0, view, "key"), [Sampling(num_frames=1, size_px=32)], backend)[0][0]
    # the plain frame was stretched from 144 to 176 rows: its rows are in proportion, so the same box fits
    left, top, right, bottom = view.box_px(176, 144)
    expected = Image.fromarray(plain).resize((32, 32), Image.Resampling.BILINEAR, box=(left, top * 176 / 144, right, bottom * 176 / 144))
    assert np.abs(np.asarray(expected)[:, ::-1].astype(int) - cropped).mean() < 2


def test_probe_reads_headers_and_probe_full_counts(clips: dict[str, Path], clips_dir: Path) -> None:
    assert probe(str(clips["b_frames.mp4"])) == VideoInfo(pytest.approx(2.4), 25.0, 96, 64, "h264", 0, 60)  # type: ignore[arg-type]
    assert probe(str(clips_dir / "bikes.mp4")) == VideoInfo(pytest.approx(10.0), 25.0, 640, 272, "h264", 0, 250)  # type: ignore[arg-type]
    for name in ("vfr.mp4", "late_start_vfr.mkv", "no_duration.mkv", "late_start.ts"):
        info = probe_full(str(clips[name]))
        assert info.num_frames == 60
        assert info.duration_s == pytest.approx(CLIPS[name][0][-1] - CLIPS[name][0][0], abs=0.05)
    if "av1.mp4" in clips:
        assert probe(str(clips["av1.mp4"])).codec == "av1"


@pytest.fixture
def bad_files(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 99)
    (tmp_path / "text.txt").write_text("not a video\n" * 99)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:10,\nfile:///other.mp4\n")
    fast = {"container_options": {"movflags": "faststart"}}
    made = {
        "empty.mp4": "empty",
        "text.mp4": "not_a_video",
        "text.txt": "not_a_video",
        "list.m3u8": "not_a_video",
        "nothing.mp4": "missing",
        make_sound(tmp_path / "sound.m4a").name: "no_video_stream",
        make_sound(tmp_path / "sound.mkv").name: "no_video_stream",
        clipmaker.cut(make_clip(tmp_path / "no_moov.mp4", CFR_S), 0.6).name: "not_a_video",
        clipmaker.cut(make_clip(tmp_path / "half.mkv", CFR_S), 0.6).name: "truncated",
        clipmaker.cut(make_clip(tmp_path / "half.mp4", CFR_S, **fast), 0.7).name: "truncated",  # type: ignore[arg-type]
    }
    return {name: (tmp_path / name, kind) for name, kind in made.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bad_file_has_its_kind(bad_files: dict[str, tuple[Path, str]], backend: str) -> None:
    for path, kind in bad_files.values():
        with pytest.raises(VideoError) as caught:
            indices(path, Sampling(num_frames=8, size_px=64), backend)
        assert (path.name, caught.value.kind, caught.value.permanent) == (path.name, kind, True)
        with pytest.raises(VideoError) as caught:
            probe_full(str(path))
        assert (path.name, caught.value.kind) == (path.name, kind)
        assert len(caught.value.what.splitlines()[0]) == len(caught.value.what) < 200


@pytest.mark.parametrize("backend", ["pyav", "auto"])  # decord decodes ahead into the damage and may fail
def test_what_a_truncated_file_holds_is_still_read(bad_files: dict[str, tuple[Path, str]], backend: str) -> None:
    for name in ("half.mkv", "half.mp4"):
        assert indices(bad_files[name][0], Sampling(num_frames=5, size_px=64), backend, span_s=(0.0, 0.4)) == [1, 3, 5, 7, 9]


def test_too_large_frames_are_refused_from_the_header(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_FRAME_PX", 96 * 64 - 1)
    for backend in BACKENDS:
        with pytest.raises(VideoError) as caught:
            indices(clips["cfr.mp4"], Sampling(size_px=64), backend)
        assert caught.value.kind == "too_large"


def test_any_fsspec_uri_and_any_way_to_its_bytes(clips: dict[str, Path]) -> None:
    sampling = Sampling(num_frames=6, size_px=64)
    fs = fsspec.filesystem("memory")
    for name in ("b_frames.mp4", "late_start_vfr.mkv", "fragments.mp4", "vp9.webm"):
        expected = indices(clips[name], sampling, "pyav")
        fs.pipe_file(f"/decode/{name}", clips[name].read_bytes())
        uri = f"memory://decode/{name}"
        for backend in BACKENDS:
            assert indices(f"file://{clips[name]}", sampling, backend) == indices(uri, sampling, backend) == expected
        for decoding in ("exact", "keyframe"):
            clip = Clip(uri, 0.0, None, View("frame", decoding=decoding), "key")  # type: ignore[arg-type]
            np.testing.assert_array_equal(decode_clip(clip, [sampling], "auto", access=RANGES), decode_clip(clip, [sampling], "pyav"))
        assert probe(uri, access=RANGES) == probe(str(clips[name]))
    fs.rm("/decode", recursive=True)


def test_storage_that_breaks_while_decoding_is_not_the_videos_fault(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/decode/clip.mp4", clips["cfr.mp4"].read_bytes())
    handle = type(fs.open("/decode/clip.mp4"))

    def broken(*_: object) -> bytes:
        raise ConnectionResetError("peer")

    monkeypatch.setattr(handle, "read", broken, raising=False)
    with pytest.raises(StorageError, match="peer"):
        decode_clip(Clip("memory://decode/clip.mp4", 0.0, None, View(), "key"), [Sampling(size_px=64)], access=RANGES)


def test_exactly_one_package_provides_decord(monkeypatch: pytest.MonkeyPatch) -> None:
    decode.check_decoder()
    for names in (("decord", "decord2"), ("decord2", "eva-decord"), ()):
        monkeypatch.setattr(decode, "_is_installed", lambda name, names=names: name in names)
        with pytest.raises(ConfigError, match="decord"):
            decode.check_decoder()


def test_an_unknown_backend_is_refused(clips: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="auto, decord, pyav"):
        indices(clips["cfr.mp4"], Sampling(size_px=64), "opencv")


@pytest.mark.parametrize(
    "folder", ["asl", "weizmann", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wagon", "natural", "neardup"))]
)
def test_both_decoders_choose_the_same_frames_of_real_clips(corpus: Path, folder: str) -> None:
    paths = sorted(p for p in (corpus / folder).rglob("*") if p.suffix in (".mp4", ".avi", ".mkv", ".webm", ".mov"))
    assert paths
    sampling = Sampling(num_frames=4, size_px=64)

    def compare(path: Path) -> None:
        name, clip = str(path.relative_to(corpus)), Clip(str(path), 0.0, None, View(), "key")
        (by_pyav,) = decode_clip(clip, [sampling], "pyav")
        if name in DECORD_EXCEPTIONS:
            with pytest.raises(VideoError, match=DECORD_EXCEPTIONS[name]):
                decode_clip(clip, [sampling], "decord")
            return
        (by_decord,) = decode_clip(clip, [sampling], "decord")
        assert np.abs(by_decord.astype(int) - by_pyav).mean() <= 3, name

    with ThreadPoolExecutor() as pool:
        list(pool.map(compare, paths))
