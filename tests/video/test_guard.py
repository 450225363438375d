"""Decoding in a child process: the same frames as without it, and nothing that a video does reaches the parent."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clipmaker import make_clip

from vkd.clips import Clip, Sampling, View
from vkd.errors import StorageError, VideoError, VkdError
from vkd.store import files
from vkd.video import guard, process
from vkd.video.access import Access
from vkd.video.decode import decode_clip, probe, probe_full
from vkd.video.guard import Guard
from vkd.video.settings import MAX_DEADLINE_S, NUM_SLOTS, Limits, Settings

SAMPLINGS = (Sampling(num_frames=3, size_px=32), Sampling(num_frames=2, size_px=48))
LIMITS = Limits(deadline_s=60.0, deadline_s_per_video_s=0.0, max_memory_bytes=1 << 30)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    path = make_clip(tmp_path_factory.mktemp("guard") / "clip.mp4", np.arange(60) / 25)
    return Clip(str(path), 0.0, None, View(), "key")


@pytest.fixture
def stub(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> Guard:
    """A guard whose decoder does what a clip's name says."""
    monkeypatch.setattr(guard, "CHILD", "stub_child")
    monkeypatch.setenv("VKD_STUB_CLIP", clip.uri)
    return Guard(Settings(SAMPLINGS, limits=LIMITS))


def named(clip: Clip, *names: str) -> list[Clip]:
    return [replace(clip, uri=f"/stub/{name}") for name in names]


def test_frames_are_those_of_the_decoder(clip: Clip) -> None:
    later = [replace(clip, start_s=i / 10, end_s=1 + i / 10) for i in range(3 * NUM_SLOTS)]
    decoder = Guard(Settings(SAMPLINGS))
    for _ in range(2):
        for views, each in zip(decoder.decode(later), later, strict=True):
            assert not isinstance(views, VideoError)
            for view, expected in zip(views, decode_clip(each, SAMPLINGS), strict=True):
                np.testing.assert_array_equal(view, expected)
    assert decoder.cpu_s > 0
    assert list(decoder.decode([])) == []


def test_errors_are_those_of_the_decoder(clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    clips = [replace(clip, uri=str(tmp_path / name)) for name in ("text.mp4", "gone.mp4")]
    found = list(Guard(Settings(SAMPLINGS)).decode([clips[0], clip, clips[1], clip]))
    assert [each.kind if isinstance(each, VideoError) else "fine" for each in found] == ["not_a_video", "fine", "missing", "fine"]
    assert isinstance(found[0], VideoError)
    assert found[0].where == clips[0].uri


def test_probes_are_those_of_the_decoder(clip: Clip, tmp_path: Path) -> None:
    prober = Guard(Settings())
    assert prober.probe(clip.uri) == probe(clip.uri)
    assert prober.probe(clip.uri, full=True) == probe_full(clip.uri)
    with pytest.raises(VideoError, match="no such file"):
        prober.probe(str(tmp_path / "gone.mp4"))


@pytest.mark.parametrize(
    ("name", "kind", "permanent"),
    [
        ("sleeps", "deadline", False),
        ("segfaults", "crash", True),
        ("aborts", "crash", True),
        ("exits", "crash", True),
        ("killed", "killed", False),
        ("allocates", "out_of_memory", True),
    ],
)
def test_a_video_that_ends_its_child_is_told_and_the_others_are_decoded(
    stub: Guard, clip: Clip, name: str, kind: str, permanent: bool
) -> None:
    fine = decode_clip(clip, SAMPLINGS)[0]
    if name == "sleeps":
        stub = Guard(replace(stub.settings, limits=replace(LIMITS, deadline_s=6.0)))
    attempts, found = [], []
    for each in stub.decode(named(clip, "fine", name, "fine")):
        found.append(each)
        attempts.append(stub.attempts)
    error = found[1]
    assert isinstance(error, VideoError)
    assert (error.kind, error.permanent, error.where) == (kind, permanent, f"/stub/{name}")
    assert attempts == [1, 3 if name == "killed" else 2, 1]
    for index in (0, 2):
        views = found[index]
        assert not isinstance(views, VideoError)
        np.testing.assert_array_equal(views[0], fine)


@pytest.mark.parametrize("name", ["segfaults.auto", "allocates.auto"])
def test_the_other_decoder_gets_a_try(stub: Guard, clip: Clip, name: str) -> None:
    (views,) = stub.decode(named(clip, name))
    assert not isinstance(views, VideoError)
    np.testing.assert_array_equal(views[0], decode_clip(clip, SAMPLINGS, "pyav")[0])
    assert stub.attempts == 2


def test_a_decoder_that_was_chosen_gets_one_try_and_all_of_the_time(stub: Guard, clip: Clip) -> None:
    chosen = Guard(replace(stub.settings, backend="pyav"))
    (error,) = chosen.decode(named(clip, "segfaults"))
    assert isinstance(error, VideoError)
    assert (error.kind, chosen.attempts) == ("crash", 1)


def test_a_clip_is_not_blamed_for_what_the_one_before_left(stub: Guard, clip: Clip) -> None:
    chosen = Guard(replace(stub.settings, backend="pyav"))
    before, harmed = chosen.decode(named(clip, "fine", "harmed"))
    assert not isinstance(before, VideoError) and not isinstance(harmed, VideoError)
    assert chosen.attempts == 2


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_a_decoder_that_says_it_lacks_memory_is_believed_in_a_fresh_child_only(stub: Guard, clip: Clip, backend: str) -> None:
    decoder = Guard(replace(stub.settings, backend=backend))
    _, error, after = decoder.decode(named(clip, "fine", "enomem", "fine"))
    assert isinstance(error, VideoError) and not isinstance(after, VideoError)
    assert (error.kind, error.permanent) == ("out_of_memory", True)


@pytest.mark.parametrize(
    ("name", "kind"), [("babbles", "crash"), ("nests", "crash"), ("stammers", "deadline"), ("spoils_clock", "deadline"), ("shrinks", None)]
)
def test_a_child_that_lies_cannot_hold_or_crash_its_parent(
    stub: Guard, clip: Clip, monkeypatch: pytest.MonkeyPatch, name: str, kind: str | None
) -> None:
    monkeypatch.setattr(process, "MESSAGE_S", 1)
    monkeypatch.setattr(process, "EXIT_S", 0.5)
    chosen = Guard(replace(stub.settings, backend="pyav", limits=replace(LIMITS, deadline_s=6.0)))
    found, after = chosen.decode(named(clip, name, "fine"))
    assert (found.kind if isinstance(found, VideoError) else None) == kind
    assert not isinstance(after, VideoError)
    np.testing.assert_array_equal(after[0], decode_clip(clip, SAMPLINGS, "pyav")[0])


def test_one_request_that_storage_never_answers_is_a_storage_error(stub: Guard, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE_S", 0.5)
    with pytest.raises(StorageError, match="no answer for"):
        list(stub.decode(named(clip, "waits_for_ever")))


def test_more_clips_than_one_request_holds(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_REQUEST_CLIPS", 3)
    assert sum(not isinstance(each, VideoError) for each in Guard(Settings(SAMPLINGS)).decode([clip] * 7)) == 7


def test_a_probe_is_tried_again_when_its_child_was_killed(clip: Clip) -> None:
    prober = Guard(Settings())
    info = prober.probe(clip.uri)
    assert prober._child is not None
    os.kill(prober._child.process.pid, signal.SIGSTOP)  # so that it is asked before it ends
    threading.Timer(0.2, os.kill, (prober._child.process.pid, signal.SIGKILL)).start()
    assert prober.probe(clip.uri) == info


def test_waiting_for_storage_does_not_count(stub: Guard, clip: Clip) -> None:
    quick = Guard(replace(stub.settings, limits=replace(LIMITS, deadline_s=2.0)))
    (views,) = quick.decode(named(clip, "slow_storage"))
    assert not isinstance(views, VideoError)


def test_storage_that_stays_away_is_no_video_error(stub: Guard, clip: Clip) -> None:
    found = stub.decode(named(clip, "fine", "unreachable"))
    next(found)
    with pytest.raises(StorageError, match="503"):
        next(found)


def test_storage_that_comes_back_gives_the_clip(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, asked = Guard(Settings(SAMPLINGS)), []
    answers = decoder._answers

    def away_once(clips: list[Clip], backend: str) -> object:
        asked.append(len(clips))
        if len(asked) == 1:
            raise StorageError("503", where="s3://bucket", action="wait", passing=True)
        return answers(clips, backend)

    monkeypatch.setattr(files, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(decoder, "_answers", away_once)
    assert not any(isinstance(each, VideoError) for each in decoder.decode([clip, clip]))
    assert asked == [2, 1, 1]


def test_a_child_left_in_the_middle_is_replaced(clip: Clip) -> None:
    decoder = Guard(Settings(SAMPLINGS))
    for start_s in (0.0, 1.0):
        views = next(iter(decoder.decode([replace(clip, start_s=start_s), clip])))
        assert not isinstance(views, VideoError)
        np.testing.assert_array_equal(views[0], decode_clip(replace(clip, start_s=start_s), SAMPLINGS)[0])


def test_children_are_replaced_after_many_clips(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_CLIPS", 2)
    decoder, pids = Guard(Settings(SAMPLINGS)), set()
    for _ in range(2):
        list(decoder.decode([clip, clip]))
        assert decoder._child is not None
        pids.add(decoder._child.process.pid)
    assert len(pids) == 2


def test_a_child_that_cannot_start_is_no_video_error(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "CHILD", "no_such_module")
    with pytest.raises(VkdError, match="no_such_module"):
        list(Guard(Settings(SAMPLINGS)).decode([clip]))


def test_the_deadline_follows_the_place_in_the_video(clip: Clip) -> None:
    limits = Limits(deadline_s=10, deadline_s_per_video_s=2)
    assert [limits.of(replace(clip, end_s=end_s)) for end_s in (None, 5.0, 1e12)] == [10, 20, MAX_DEADLINE_S]


def test_settings_travel_as_json() -> None:
    for settings in (Settings(), Settings(SAMPLINGS, "pyav", Access(("/videos",), 7, 2.5), LIMITS)):
        assert Settings.from_json(settings.to_json()) == settings
    assert Settings(access=Access(max_requests_per_s=6)).share(3).access.max_requests_per_s == 2


def test_each_thread_has_one_guard_which_ends_with_it(clip: Clip) -> None:
    settings, pids = Settings(SAMPLINGS), []

    def work() -> None:
        mine = guard.here(settings)
        assert guard.here(settings) is mine
        list(mine.decode([clip]))
        assert mine._child is not None
        pids.append(mine._child.process.pid)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert len(set(pids)) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_child_ends_with_a_parent_that_is_killed(clip: Clip) -> None:
    program = f"""
        import time
        from vkd.clips import Clip, Sampling, View
        from vkd.video.guard import Guard, Settings
        guard = Guard(Settings((Sampling(num_frames=3, size_px=32),)))
        list(guard.decode([Clip({clip.uri!r}, 0.0, None, View(), "key")]))
        print(guard._child.process.pid, flush=True)
        time.sleep(1000)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_what_is_no_video_costs_no_child_and_leaves_nothing_open(stub: Guard, clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    prober, kept, pids = Guard(Settings()), [], set()
    for _ in range(3):
        with pytest.raises(VideoError) as caught:
            prober.probe(str(tmp_path / "text.mp4"))
        kept.append(caught.value)
        assert prober._child is not None
        pids.add(prober._child.process.pid)
    assert len(pids) == 1
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    kept += [error for error in stub.decode(named(clip, *["segfaults"] * 3)) if isinstance(error, VideoError)]
    assert len(kept) == 6
    stub.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= num_open
