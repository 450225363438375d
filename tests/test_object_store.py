"""The whole data path on a real S3 server that fails in every way: nothing is rejected for it, nothing waits for ever. Without Ray."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fault_proxy
import fsspec
import pytest
import small
from fault_proxy import DENIED, EXPIRED, HANG, PASSING, Fault, FaultProxy, Request, S3Server

from vkd import planning, training, verification
from vkd.checkpoint import load_student
from vkd.clips import Clip, Sampling, View
from vkd.errors import StorageError, VideoError
from vkd.manifest import BuildOptions, build
from vkd.planning import Plan
from vkd.run import Run, parse
from vkd.store import files
from vkd.store.labelset import LabelSet
from vkd.video import fetch, guard
from vkd.video.settings import Settings

BUCKET = "s3://bucket"
OPTIONS = BuildOptions(label_from="regex:_([a-z]+)", chunk_size=5)


@pytest.fixture(scope="module")
def server(small_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server whose `bucket` has three videos under `videos/` and their manifest."""
    root = tmp_path_factory.mktemp("s3")
    shutil.copytree(small_videos, root / "bucket" / "videos")
    server = S3Server(root)
    with pytest.MonkeyPatch.context() as patch:
        _point_to(server.port, patch)
        build(f"{BUCKET}/videos", f"{BUCKET}/manifest", OPTIONS)
        yield server
    _forget_clients()
    server.kill()


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server that every client uses, and little patience between two tries."""
    with FaultProxy(server.port) as proxy:
        _point_to(proxy.port, monkeypatch)
        monkeypatch.setattr(files, "FIRST_WAIT_S", 0.1)
        yield proxy
        guard._HERE.__dict__.clear()
    _point_to(server.port, monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that reads and writes the bucket only."""
    tree, mine = small.tree_of(Path("unused")), f"{BUCKET}/{tmp_path.name}"
    tree["output"], tree["labels"]["store"], tree["data"]["manifest"] = f"{mine}/out", f"{mine}/labels", f"{BUCKET}/manifest"
    return parse(tree)


def _point_to(port: int, patch: pytest.MonkeyPatch) -> None:
    for name, value in fault_proxy.environment(port).items():
        patch.setenv(name, value)
    _forget_clients()


def _forget_clients() -> None:
    """Else this process and its decoding child keep the address and the keys of before."""
    guard._HERE.__dict__.clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def _all_labelled(run: Run) -> bool:
    found = verification.verify(run, num_sampled=1)
    return found.ok and all(check.labelled == check.planned for check in found.sets)


def _whole_data_path(run: Run, source: str) -> None:
    report = build(source, run.data.manifest, OPTIONS)
    assert (report.videos, report.rejected) == (3, {})
    small.label(run)
    assert _all_labelled(run)
    spec = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))["teacher"]
    (shard,) = {chunk.shard for chunk in Plan.of(run).chunks}
    LabelSet.open(run.labels.store, spec).compact(0, shard, len(Plan.of(run).chunks))
    assert training.train(run, lambda _: None).num_steps > 0
    assert load_student(f"{run.output}/student").heads.keys() == {"logits", "embedding"}
    assert training.train(run, lambda _: None).skipped


@pytest.mark.slow  # half a minute
def test_no_fault_rejects_anything_on_the_whole_data_path(run: Run, proxy: FaultProxy) -> None:
    proxy.script = fault_proxy.bursts(*PASSING, every=28, length=3)  # one more than what is tried in silence
    _whole_data_path(small.changed(run, f"data.manifest={run.output}/manifest", "train.epochs=1"), f"{BUCKET}/videos")
    hurt = {request.method for request in proxy.seen if proxy.script(request)}
    assert hurt >= {"GET", "HEAD", "PUT"}


def test_no_fault_rejects_anything_that_is_read_in_ranges(proxy: FaultProxy) -> None:
    settings = Settings((Sampling(num_frames=1, size_px=8),), access=fetch.Access(max_inline_bytes=0))
    quiet = list(guard.here(settings).decode([_clip("a_sharp"), _clip("b_dull"), _clip("c_sharp")]))
    proxy.script = fault_proxy.bursts(*PASSING, every=7, length=3)
    for views, expected in zip(guard.here(settings).decode([_clip("a_sharp"), _clip("b_dull"), _clip("c_sharp")]), quiet, strict=True):
        assert not isinstance(views, VideoError)
        assert not isinstance(expected, VideoError)
        assert (views[0] == expected[0]).all()
    assert any(proxy.script(request) for request in proxy.seen)


@pytest.mark.slow
@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: fault.code or fault.kind)
def test_each_fault_alone(run: Run, proxy: FaultProxy, fault: Fault) -> None:
    proxy.script = fault_proxy.bursts(fault, every=9, length=4)
    _whole_data_path(small.changed(run, f"data.manifest={run.output}/manifest"), f"{BUCKET}/videos")


@pytest.mark.parametrize("how", [pytest.param("refused", marks=pytest.mark.slow), "killed"])
def test_a_server_that_goes_away_and_comes_back_rejects_nothing(
    run: Run, server: S3Server, proxy: FaultProxy, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stop, start = (proxy.down, proxy.up) if how == "refused" else (server.kill, server.start)
    back = threading.Timer(2.0, start)
    proxy.script = _once_labelling(lambda: _in_background(stop, back))
    small.label(run)
    back.join()
    assert "asking again in" in capfd.readouterr().err
    assert _all_labelled(run)


def _once_labelling(act: Callable[[], None]) -> fault_proxy.Script:
    """A script without faults that acts at the second chunk file."""
    puts: list[Request] = []

    def script(request: Request) -> None:
        if request.method == "PUT" and "chunk-" in request.path:
            puts.append(request)
            if len(puts) == 2:
                act()

    return script


def _in_background(stop: Callable[[], None], then: threading.Timer | None = None) -> None:
    def stopped() -> None:
        stop()
        if then is not None:
            then.start()

    threading.Thread(target=stopped).start()


def test_patience_ends_and_what_is_committed_stays(run: Run, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "PATIENCE_S", 0.5)
        proxy.script = _once_labelling(lambda: _in_background(proxy.down))
        with pytest.raises(StorageError, match="run the same command again") as raised:
            small.label(run)
        assert (raised.value.exit_code, raised.value.passing) == (3, True)
    proxy.script = fault_proxy.no_fault
    proxy.up()
    checks = verification.verify(run, num_sampled=0).sets
    assert sum(check.labelled for check in checks) > 0
    assert {(check.rejected, *check.damaged) for check in checks} == {(0,)}
    small.label(run)
    assert _all_labelled(run)


def _without_keys(patch: pytest.MonkeyPatch) -> None:
    patch.delenv("AWS_ACCESS_KEY_ID")
    patch.delenv("AWS_SECRET_ACCESS_KEY")


def _with_wrong_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("AWS_SECRET_ACCESS_KEY", "WRONG")


OPERATIONS: Sequence[Callable[[], Any]] = (
    lambda: files.put(f"{BUCKET}/x", b"x"),
    lambda: files.read(f"{BUCKET}/manifest/manifest.json"),
    lambda: files.exists(f"{BUCKET}/x"),
    lambda: files.list_names(BUCKET),
    lambda: build(f"{BUCKET}/videos", f"{BUCKET}/other", OPTIONS),
    lambda: list(guard.here(Settings((Sampling(num_frames=1, size_px=8),))).decode([_clip("a_sharp"), _clip("b_dull")])),
)


def _clip(name: str) -> Clip:
    return Clip(f"{BUCKET}/videos/{name}.mp4", 0.0, 0.5, View(), name)


@pytest.mark.parametrize("keys", ["none", "wrong", "expired"])
def test_without_valid_keys_it_ends_at_once_with_one_line(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, keys: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if keys == "expired":
        proxy.script = lambda _: EXPIRED
    else:
        (_without_keys if keys == "none" else _with_wrong_keys)(monkeypatch)
    _forget_clients()
    for operation in OPERATIONS:
        with pytest.raises(StorageError, match="credentials") as raised:
            operation()
        assert not raised.value.passing
        assert len(str(raised.value).splitlines()) == 1
    assert capfd.readouterr().err == ""
    assert len(proxy.seen) <= 4 * len(OPERATIONS)


def test_one_refused_video_is_a_reject_and_all_of_them_are_the_storage(proxy: FaultProxy) -> None:
    child, clips = guard.here(Settings((Sampling(num_frames=1, size_px=8),))), [_clip("a_sharp"), _clip("b_dull")]
    proxy.script = lambda request: DENIED if "a_sharp" in request.path else None
    refused, frames = child.decode(clips)
    assert isinstance(refused, VideoError)
    assert (refused.kind, refused.permanent) == ("forbidden", False)
    assert not isinstance(frames, VideoError)
    proxy.script = lambda request: DENIED
    with pytest.raises(StorageError, match="access denied to all 2 videos"):
        list(child.decode(clips))


def test_one_missing_video_is_a_reject_and_a_lost_bucket_is_the_storage(
    proxy: FaultProxy, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = "s3://lost/a_sharp.mp4"
    files.filesystem("s3://lost")[0].mkdir("lost")
    files.put(uri, b"x")
    with fetch.opened(uri):
        pass
    files.delete(uri)
    with pytest.raises(VideoError, match="no such file"), fetch.opened(uri):
        pass
    files.delete("s3://lost")
    lost: Sequence[Callable[[], Any]] = (
        lambda: fetch.opened(uri).__enter__(),
        lambda: files.read(uri),
        lambda: files.exists(uri),
        lambda: files.list_names("s3://lost/labels"),
        lambda: files.put("s3://lost/x", b"x"),
        lambda: build("s3://lost", f"{BUCKET}/other", OPTIONS),
        lambda: small.label(small.changed(run, "labels.store=s3://lost/labels")),
    )
    for operation in lost:
        with pytest.raises(StorageError, match="make the bucket") as raised:
            operation()
        assert not raised.value.passing
    assert capfd.readouterr().err == ""


def test_a_server_that_never_answers_holds_no_request(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient = {**files.S3_OPTIONS, "config_kwargs": {**files.S3_OPTIONS["config_kwargs"], "read_timeout": 0.2}}
    monkeypatch.setitem(files.OPTIONS, "s3", impatient)
    monkeypatch.setattr(files, "PATIENCE_S", 0.0)
    proxy.script = lambda _: HANG
    with pytest.raises(StorageError, match="Timeout") as raised:
        files.read(f"{BUCKET}/manifest/manifest.json")
    assert raised.value.passing
    with pytest.raises(StorageError, match="Timeout"), fetch.opened(f"{BUCKET}/videos/a_sharp.mp4"):
        pass


def test_a_whole_object_is_one_request_each_way(proxy: FaultProxy) -> None:
    files.put(f"{BUCKET}/a/b.bin", b"0123456789")
    assert files.read(f"{BUCKET}/a/b.bin") == b"0123456789"
    assert files.read(f"{BUCKET}/a/b.bin", start=-3) == b"789"
    assert files.list_names(f"{BUCKET}/a") == ["b.bin"]
    assert [request.method for request in proxy.seen if "b.bin" in request.path] == ["PUT", "GET", "GET"]
    files.delete(f"{BUCKET}/a")
    assert not files.exists(f"{BUCKET}/a/b.bin")


def test_decode_processes_together_keep_to_the_rate(proxy: FaultProxy) -> None:
    rate, num_processes, num_clips = 10.0, 3, 3
    settings = Settings((Sampling(num_frames=1, size_px=8),), access=fetch.Access(max_requests_per_s=rate)).share(num_processes)

    def decode_all() -> None:
        list(guard.Guard(settings).decode([_clip("a_sharp")] * num_clips))

    threads = [threading.Thread(target=decode_all) for _ in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times_s = [request.time_s for request in proxy.seen]
    assert len(times_s) == num_processes * num_clips * 2
    assert len(times_s) <= 1.5 * rate * (max(times_s) - min(times_s)) + 2 * num_processes
