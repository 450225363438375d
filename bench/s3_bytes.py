"""What reading videos from an object store costs: requests and bytes of each clip, whole objects against ranges.

    python bench/s3_bytes.py --json       ratio: bytes read / size of the clips' objects, of both ways and both kinds of objects

Clips of wagon lie on a local S3 server (`rclone serve s3`) behind a proxy that counts, and are labelled by the functions that
`vkd label`'s workers call, without Ray, with a teacher that takes no time: once with `max_inline_bytes` above every object
(each is read whole by one request), once with 0 (blocks of 4 MiB are read as they are needed). `short` objects are the clips as
they are, of some 100 KB: one block holds all of one. `long` is one object of all of them joined, of which each clip is a
window. Only requests for videos count, those that probe them for the manifest do not.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from measure import arguments, corpus, finish

from vkd import planning
from vkd import run as run_files
from vkd.manifest import BuildOptions, build
from vkd.run import Run
from vkd.store.labelset import LabelSet

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import small  # type: ignore[import-not-found]
from fault_proxy import FaultProxy, S3Server, environment  # type: ignore[import-not-found]

WAYS = {"whole": 1 << 40, "ranges": 0}  # -> max_inline_bytes
SHORT: dict[str, Any] = {"plan": "whole"}


def main() -> None:
    options = arguments(__doc__ or "", videos=32, window_s=2.0)
    folder = Path(tempfile.mkdtemp(prefix="vkd-bench-"))
    videos = sorted((corpus() / "wagon").rglob("*.mp4"))[:: max(1, 200 // options.videos)][: options.videos]
    (folder / "bucket" / "short").mkdir(parents=True)
    (folder / "bucket" / "long").mkdir()
    for video in videos:
        shutil.copy(video, folder / "bucket" / "short" / video.name)
    joined(videos, folder / "bucket" / "long" / "joined.mp4")
    server = S3Server(folder)
    try:
        with FaultProxy(server.port) as proxy:
            os.environ.update(environment(proxy.port))
            result = measured(folder, proxy, "short", SHORT)
            result |= measured(folder, proxy, "long", {"plan": "windows", "length_s": options.window_s})
        finish(result, options.json)
    finally:
        server.kill()
        shutil.rmtree(folder)


def joined(videos: Sequence[Path], target: Path) -> None:
    """One video of all of them, encoded anew with a keyframe a second."""
    with av.open(str(target), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream("libx264", rate=25, options={"g": "25", "preset": "ultrafast", "qp": "10"})
        stream.width, stream.height = 640, 480
        number = 0
        for video in videos:
            with av.open(str(video)) as old:
                for frame in old.decode(video=0):
                    frame = frame.reformat(640, 480, "yuv420p")
                    frame.pts, frame.time_base, number = number, Fraction(1, 25), number + 1
                    frame.pict_type = av.video.frame.PictureType.NONE
                    new.mux(stream.encode(frame))
        new.mux(stream.encode(None))


def measured(folder: Path, proxy: FaultProxy, kind: str, clips: dict[str, Any]) -> dict[str, Any]:
    """Requests and bytes of each clip of one kind of objects, both ways."""
    build(f"s3://bucket/{kind}", str(folder / f"{kind}-manifest"), BuildOptions(chunk_size=8))
    objects = list((folder / "bucket" / kind).iterdir())
    figures: dict[str, Any] = {f"{kind}_object_bytes": sum(each.stat().st_size for each in objects) / len(objects)}
    for way, max_inline_bytes in WAYS.items():
        run = _run(folder, f"{kind}-{way}", kind, clips, max_inline_bytes)
        before = len(proxy.seen)
        num_clips = _labelled(run)
        seen = [request for request in proxy.seen[before:] if request.path.startswith(f"/bucket/{kind}/")]
        num_bytes = sum(request.num_bytes for request in seen)
        figures |= {
            f"{kind}_{way}_requests_per_clip": len(seen) / num_clips,
            f"{kind}_{way}_bytes_per_clip": num_bytes / num_clips,
            f"{kind}_{way}_ratio": num_bytes / num_clips / figures[f"{kind}_object_bytes"],
        }
        print(f"{kind}, {way}: {num_clips} clips, {len(seen)} requests, {num_bytes} bytes", flush=True)
    return figures


def _labelled(run: Run) -> int:
    """Label all clips; their number."""
    small.label(run)
    spec = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))["teacher"]
    found = LabelSet.open(run.labels.store, spec).summary(0)
    if found.rejects:
        sys.exit(f"rejected: {dict(found.rejects)}")
    return found.num_labelled


def _run(folder: Path, name: str, kind: str, clips: dict[str, Any], max_inline_bytes: int) -> Run:
    tree = {
        "name": name,
        "output": str(folder / name),
        "data": {"manifest": str(folder / f"{kind}-manifest"), "clips": clips, "max_inline_bytes": max_inline_bytes},
        "labels": {"store": str(folder / name / "labels")},
        "recipe": {"name": "kd", "teacher": {"name": "fakes:TinyTeacher", "num_frames": 8, "size_px": 224}, "student": "shift_cnn"},
    }
    return run_files.parse(tree)


if __name__ == "__main__":
    main()
