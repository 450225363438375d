"""`vkd run` of the whole of jobs/dns.yaml, made small, killed in each of its runs: it must end with what it ends with in peace.

    python bench/chaos_chain.py --rounds 2 --json

The command and all that it started is killed by SIGKILL some seconds after a run of the workflow began, and started again; so each run
is killed once a round, those before it only find what is done. Then it is left to end. Rendered copies, the weights of each network
and the fine codes of the index must be equal, to the bit, to those of the same command in the same place without kills: `differing`
names those that are not. Videos are known by their content there: those that are rendered again are the same videos.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from measure import arguments, corpus, finish

JOBS = Path(__file__).resolve().parents[1] / "jobs"
MAX_DELAY_S = 12.0  # between the beginning of a run and the kill
SHORT_DELAY_S = {"dns_index": 0.8}  # it is soon done
SILENCE_S = 600.0
SMALLER: dict[str, Any] = {
    "per_video": 4,
    "split": [5, 2, 2],
    "distractors": [],
    "max_frames": 16,
    "dims": 32,
    "num_dims": 32,
    "num_bits": 32,
    "num_neighbours": 6,
    "num_random": 6,
    "epochs": 3,
    "every_examples": 8,
}
NUM_SOURCES = 9


def main() -> None:
    options = arguments("the chain of jobs/dns.yaml under fire", rounds=1, seed=0, keep=0)
    folder = Path(tempfile.mkdtemp(prefix="vkd-chaos-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        finish(chaos(folder, options), options.json)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def chaos(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The chain in peace, under fire, and what differs."""
    started_s = time.monotonic()
    calm = Chain(folder / "chain")
    calm.end()
    calm_s = time.monotonic() - started_s
    expected = dict(contents(calm.folder))
    shutil.rmtree(calm.folder)
    chain, rng, kills = Chain(folder / "chain"), random.Random(options.seed), Counter[str]()
    runs = [step["name"] for step in steps(JOBS / "dns.yaml")]
    for name in runs * options.rounds:
        kills[name] += chain.killed_in(name, rng.uniform(0.0, SHORT_DELAY_S.get(name, MAX_DELAY_S)))
        print(f"{name}: killed {kills[name]} times", flush=True)
    chain.end()
    made = dict(contents(chain.folder))
    differing = sorted(name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name))
    figures = {"calm_s": calm_s, "fire_s": time.monotonic() - started_s - calm_s, "kills": kills.total(), "kills_per_run": dict(kills)}
    return figures | {"tracebacks": chain.tracebacks, "compared": len(expected), "differing": differing}


class Chain:
    """The small chain in a folder of its own, as a command that is started again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.tracebacks = folder, folder / "log.txt", 0
        folder.mkdir()
        (folder / "sources.csv").write_text("uri\n" + "".join(f"{path}\n" for path in sources()))
        for path in JOBS.glob("dns*.yaml"):
            text = path.read_text().replace("runs/dns", str(folder)).replace("jobs/dns_sources.csv", f"{folder}/sources.csv")
            tree = _smaller(yaml.safe_load(text.replace("../shared/corpus", str(corpus()))))
            if "source" in tree.get("data", {}):
                tree["data"]["hash"] = True
            if tree.get("recipe", {}).get("name") == "dns":
                tree["recipe"]["min_positive"] = 0.5  # a teacher that has hardly learned finds all alike
            (folder / path.name).write_text(yaml.safe_dump(tree, sort_keys=False))

    def killed_in(self, name: str, delay_s: float) -> bool:
        """Start it, and kill it so long after the run of this name began; False when it ended before."""
        process = self._started()
        self._wait_for(f": {name}\n", process)
        deadline_s = time.monotonic() + delay_s
        while time.monotonic() < deadline_s and process.poll() is None:
            time.sleep(0.05)
        survived = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if survived else None
        process.wait()
        self._note()
        return survived

    def end(self) -> None:
        """Let it come to its end."""
        process = self._started()
        if code := process.wait():
            sys.exit(f"it ended with {code} and said {self.log.read_text()[-3000:]}")
        self._note()

    def _started(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "vkd", "run", str(self.folder / "dns.yaml")]
        with self.log.open("wb") as log:
            return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)

    def _wait_for(self, text: str, process: subprocess.Popen[bytes]) -> None:
        since_s = time.monotonic()
        while text not in self.log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() - since_s > SILENCE_S:
                sys.exit(f"{text.strip()!r} did not begin; it said {self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def _note(self) -> None:
        self.tracebacks += self.log.read_text(errors="replace").count("Traceback")


def sources() -> list[Path]:
    return sorted((corpus() / "asl").glob("*.mkv"))[:NUM_SOURCES]


def steps(workflow: Path) -> Iterator[dict[str, Any]]:
    """Of each run of a workflow its name, which may be an override."""
    for step in yaml.safe_load(workflow.read_text())["runs"]:
        named = [word.removeprefix("name=") for word in step.get("set", []) if word.startswith("name=")]
        yield {"name": (named or [yaml.safe_load((workflow.parent / step["run"]).read_text())["name"]])[0]}


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """What was made of videos; not checkpoints, of which a killed run has others."""
    for path in sorted(folder.rglob("*")):
        if (path.suffix in (".mp4", ".safetensors") and "attempts" not in path.parts) or path.name.endswith(".fine.parquet"):
            yield str(path.relative_to(folder)), path.read_bytes()


def _smaller(tree: Any, key: str = "") -> Any:
    """A part of a run file with small numbers; those in overrides too."""
    if isinstance(tree, dict):
        return {name: _smaller(value, name) for name, value in tree.items()}
    if key in SMALLER and tree:
        return SMALLER[key]
    if isinstance(tree, list):
        return [_smaller(value) for value in tree]
    if isinstance(tree, str):
        return re.sub(r"(\w+)([:=] ?)(\d+)\b", lambda m: f"{m[1]}{m[2]}{SMALLER.get(m[1], m[3])}", tree)
    return tree


if __name__ == "__main__":
    main()
