"""How near `vkd plan` comes to the time that a run then takes.

    python bench/plan_accuracy.py --json

Real clips of 180x144 as they are, and others of them enlarged to 720p, half by half. `vkd plan --sample 10%` forecasts; then
`vkd distill` labels and trains in the same shape (mode tee). `relative_error` is (forecast - taken) / taken, of the whole command.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

from measure import arguments, corpus, finish, spread  # isort: skip

import av
import yaml

VKD = Path(sys.executable).with_name("vkd")
LARGE, MAX_FRAMES = (1280, 720), 50


def main() -> None:
    options = arguments(__doc__ or "", repeats=3, clips=120, epochs=3)
    folder = Path(tempfile.mkdtemp(prefix="vkd-bench-"))
    try:
        videos = mixed(folder / "videos", options.clips)
        errors, told = [], {}
        for repeat in range(options.repeats):
            told = once(folder / str(repeat), videos, options.epochs)
            print(f"repeat {repeat}: {told}", flush=True)
            errors.append(told["relative_error"])
        worst = max(errors, key=abs)
        finish({**told, "errors": spread(errors), "relative_error": worst}, options.json)
    finally:
        shutil.rmtree(folder)


def mixed(folder: Path, count: int) -> Path:
    """Half of the clips as they are, the other half enlarged."""
    folder.mkdir(parents=True)
    clips = sorted(corpus().glob("weizmann/*/*.avi")) + sorted(corpus().glob("wagon/*/*.mp4"))
    step = max(1, len(clips) // count)
    for number, clip in enumerate(clips[::step][:count]):
        target = folder / f"{number:04d}{clip.suffix if number % 2 else '.mp4'}"
        if number % 2:
            shutil.copy(clip, target)
        else:
            enlarge(clip, target)
    return folder


def enlarge(source: Path, target: Path) -> None:
    """Its first frames at 720p, H.264."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        video = read.streams.video[0]
        stream = write.add_stream("libx264", rate=Fraction(video.average_rate or 25), options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = *LARGE, "yuv420p"
        for frame in itertools.islice(read.decode(video), MAX_FRAMES):
            resized = frame.reformat(*LARGE, format="yuv420p")
            resized.pts = None
            write.mux(stream.encode(resized))
        write.mux(stream.encode())


def once(folder: Path, videos: Path, epochs: int) -> dict[str, Any]:
    """One forecast, and the run that it is about."""
    run = run_file(folder, videos, epochs)
    forecast = json.loads(command("plan", run, "--sample", "10%", "--json").splitlines()[-1])
    started_s = time.monotonic()
    command("distill", run)
    taken_s = time.monotonic() - started_s
    parts = {name: forecast[name] for name in ("start_s", "label_s", "epoch_s", "bottleneck", "num_clips_measured")}
    return {**parts, "forecast_s": forecast["total_s"], "taken_s": taken_s, "relative_error": forecast["total_s"] / taken_s - 1}


def command(*words: str) -> str:
    """What a vkd command says on stdout; its own words, when it fails."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([str(VKD), *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"vkd {' '.join(words)}: {done.stderr[-2000:]}")
    return done.stdout


def run_file(folder: Path, videos: Path, epochs: int) -> str:
    folder.mkdir()
    tree = {
        "name": "plan",
        "output": str(folder / "out"),
        "data": {"source": str(videos), "manifest": str(folder / "manifest"), "chunk_size": 16, "keep_frames": "jpeg"},
        "labels": {"store": str(folder / "labels")},
        "recipe": {"name": "kd", "teacher": {"name": "efficientnet_lite", "variant": 0}, "student": {"name": "shift_cnn", "size": "small"}},
        "train": {"epochs": epochs, "batch_size": 16},
        "checkpoint": {"every_examples": 64},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "run.yaml")


if __name__ == "__main__":
    main()
