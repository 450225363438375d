"""Small runs on real clips, and the console script that works on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vkd.run import Run, parse

VKD = Path(sys.executable).with_name("vkd")
Tree = dict[str, Any]


def small_run(folder: Path, videos: Path) -> Tree:
    """A run of EfficientNet-Lite0 and a small student: all that it writes lies in `folder`."""
    return {
        "name": "small",
        "output": str(folder / "out"),
        "data": {
            "source": str(videos),
            "manifest": str(folder / "manifest"),
            "label_from": "regex:([a-z]+)",
            "chunk_size": 4,
            "clips": {"plan": "windows", "length_s": 1.0},
            "split": {"by": "time", "holdout": 0.25},
            "keep_frames": "jpeg",
        },
        "labels": {"mode": "stored", "store": str(folder / "labels")},
        "recipe": {"name": "kd", "teacher": {"name": "efficientnet_lite", "variant": 0}, "student": {"name": "shift_cnn", "size": "small"}},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 0.002},
        "checkpoint": {"every_examples": 6},
        "compute": {"decode": {"workers": 1}, "teacher": {"actors": 1}},  # starting more costs more than they save
    }


def parsed(tree: Tree, *overrides: str) -> Run:
    """The run of a tree, which stays as it is."""
    return parse(yaml.safe_load(yaml.safe_dump(tree)), overrides)


def write(tree: Tree, path: Path) -> Path:
    """The tree as a run file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


@dataclass
class Command:
    """The console script at work in a session of its own; what it starts is known by a mark in the environment."""

    process: subprocess.Popen[str]
    mark: str

    def until(self, happened: Callable[[], object]) -> None:
        """Wait until something has happened; the command must still be running then."""
        while not happened():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def finish(self, timeout_s: float = 120) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, once it has ended."""
        stdout, stderr = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, stdout, stderr

    def left_behind(self) -> list[int]:
        """Processes that it started and that are alive."""
        return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if self.mark.encode() in _environment(folder)]


@contextmanager
def vkd(*arguments: object, program: Sequence[object] = (VKD,)) -> Iterator[Command]:
    """Start the console script as on a machine of two cores; in the end nothing of it is left."""
    mark = f"VKD_TEST={uuid.uuid4().hex}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'} | dict([mark.split("=")])
    words = [str(word) for word in (*program, *arguments)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True, preexec_fn=_hear_ctrl_c
    )
    command = Command(process, mark)
    try:
        yield command
    finally:
        for pid in command.left_behind():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def _hear_ctrl_c() -> None:
    """A shell's background job ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _environment(folder: Path) -> bytes:
    try:
        return (folder / "environ").read_bytes()
    except OSError:  # it has ended, or is not ours
        return b""
