"""Small runs on real clips, and the console script that works on them."""

from __future__ import annotations

import os
import subprocess
import sys
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
        "labels": {"store": str(folder / "labels")},
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


def vkd(*arguments: object, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """The console script, run to its end in a process of its own."""
    return subprocess.run([VKD, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s, env=os.environ | environment)
