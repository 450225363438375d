"""`vkd label` on a real Ray cluster while its processes are killed, one after another: nothing may be lost or be there twice.

    python bench/chaos_label.py --kills 50 --json

Killed by SIGKILL in a seeded order: the driver, a decode child, a decode worker, a teacher actor, the worker node's raylet (a new
node is started), the head (the whole cluster is started anew). Each kill comes only after at least one new chunk was committed
since the last one. When the driver has ended, for whatever reason, the same command is started again. When all chunks are there
before all kills were made, one more view is asked for.

`redone` is the clips that teachers began to label less those that are labelled in the end: the teacher itself notes them before it
works, so what a kill threw away counts too. `bound` is the clips of as many chunks as the execution lets be in flight, times the
kills. `rewritten` counts chunk files that were written again, as a poller sees them. In the end every chunk (or the first
`--compare` ones of a seeded order) is made again in this process, without Ray, and compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from chaos_check import CHUNK_SIZE, DECODE_WORKERS, TEACHER_ACTORS, compared, counts, notes_of, tree_of
from chaos_driver import Driver, under_fire
from chaos_teacher import num_noted
from measure import arguments, corpus
from raylets import NUM_CPUS, Cluster, kill

from vkd import run as run_files
from vkd.manifest import BuildOptions, build

import psutil  # isort: skip

KINDS = ("driver", "decode child", "decode worker", "teacher actor", "raylet", "head")
IN_FLIGHT = 4 * (DECODE_WORKERS + TEACHER_ACTORS)  # what labelling bounds the object store to, in chunks
SILENCE_S = 300.0  # without a new chunk: something hangs
HEAD_GONE_S = 120.0  # for the driver to notice
MAX_DELAY_S = 1.0  # between a new chunk and the kill


class Commits(threading.Thread):
    """Looks at the store's chunk files all the time: which there are, and how often one was written again."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self.store, self.rewritten, self._ended = store, Counter[str](), threading.Event()
        self._seen: dict[Path, tuple[int, int]] = {}

    @property
    def num_chunks(self) -> int:
        """Chunks of labels that are there."""
        return sum(path.parents[2].name.startswith("teacher-") for path in list(self._seen))

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self.look()

    def look(self) -> None:
        for path in self.store.glob("*/view=*/*/chunk-*.parquet"):
            state = path.stat()
            now = (state.st_ino, state.st_mtime_ns)
            if self._seen.setdefault(path, now) != now:
                self.rewritten[path.parents[2].name.split("-")[0]] += 1
                self._seen[path] = now

    def stop(self) -> None:
        self._ended.set()
        self.join()


class Chaos:
    """Kills one process after another, and counts what comes of it."""

    def __init__(self, cluster: Cluster, run_file: Path, commits: Commits, seed: int) -> None:
        self.cluster, self.run_file, self.commits, self.num_views = cluster, run_file, commits, 1
        self.driver = Driver(cluster, words_of(run_file, 1), run_file.with_name("driver.log"))
        self.random = random.Random(seed)
        self.recovery_s: dict[str, list[float]] = defaultdict(list)
        self.hung = 0

    def order(self, num_kills: int) -> list[str]:
        """Each kind as often as the others, in a seeded order."""
        kinds = [KINDS[i % len(KINDS)] for i in range(num_kills)]
        self.random.shuffle(kinds)
        return kinds

    def run(self, num_kills: int) -> None:
        last, before = "", 0
        for number, kind in enumerate([*self.order(num_kills), ""], start=1):
            since_s = time.monotonic()
            targets = self._wait_for_chunk_and_target(before, kind)
            if last:
                self.recovery_s[last].append(self.new_chunk_s - since_s)
            if not kind:
                return
            time.sleep(self.random.uniform(0.0, MAX_DELAY_S))
            before, last = self.commits.num_chunks, kind
            print(f"{number:3d} of {num_kills}: {kind}, {before} chunks there", flush=True)
            self._kill(kind, targets)

    def finish(self) -> None:
        """Let the driver label what lacks."""
        while not self.driver.keep_going():
            self._refuse_silence(self.commits.num_chunks)
            time.sleep(0.1)

    def _wait_for_chunk_and_target(self, before: int, kind: str) -> list[psutil.Process]:
        """Wait for one chunk more than before, and then for something to kill."""
        self._last_change_s, self._last_count, self.new_chunk_s = time.monotonic(), before, 0.0
        while True:
            if self.driver.keep_going():
                self.num_views += 1
                self.driver.next(words_of(self.run_file, self.num_views))
            count = self.commits.num_chunks
            if count > before and not self.new_chunk_s:
                self.new_chunk_s = time.monotonic()
            if self.new_chunk_s and (not kind or (targets := self._targets(kind))):
                return targets if kind else []
            self._refuse_silence(count)
            time.sleep(0.02)

    def _targets(self, kind: str) -> list[psutil.Process]:
        """One process of a kind; a random one where there are several."""
        driver = self.driver.process
        if driver is None or driver.poll() is not None:
            return []
        if kind == "driver":
            found = [psutil.Process(driver.pid)]
        elif kind == "head":
            found = [psutil.Process(self.cluster.head_pid)]
        elif kind == "raylet":
            found = self.cluster.raylets()
        elif kind == "teacher actor":
            found = self.cluster.teacher_actors()
        else:
            found = self.cluster.decode_children()
            if kind == "decode worker":
                found = [parent for child in found if (parent := _parent(child)) is not None]
        return [self.random.choice(found)] if found else []

    def _kill(self, kind: str, targets: Sequence[psutil.Process]) -> None:
        if kind == "head":
            self.cluster.kill_head()
            if not self.driver.wait_for_end(HEAD_GONE_S):
                self.hung += 1
                print(f"    the driver goes on without a head: {self.driver.last_words()}", flush=True)
            self.cluster.start()
        else:
            kill(targets)
            if kind == "raylet":
                self.cluster.start_node()
            elif kind == "driver":
                self.driver.wait_for_end(10)

    def _refuse_silence(self, count: int) -> None:
        if count > self._last_count:
            self._last_change_s, self._last_count = time.monotonic(), count
        elif time.monotonic() - self._last_change_s > SILENCE_S:
            raise RuntimeError(f"no new chunk for {SILENCE_S:.0f} s; the driver said {self.driver.last_words()}")


def words_of(run_file: Path, num_views: int) -> list[str]:
    """The command that labels so many views."""
    return ["label", str(run_file), f"data.views.count={num_views}", "--json"]


def main() -> None:
    options = arguments("vkd label under fire", kills=50, seed=0, clips="wagon", compare=0, keep=0)
    under_fire(chaos, options)


def chaos(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Label under fire, then check every chunk."""
    build(str(corpus() / options.clips), str(folder / "manifest"), BuildOptions(chunk_size=CHUNK_SIZE))
    run_file, store = folder / "run.yaml", folder / "labels"
    run_file.write_text(yaml.safe_dump(tree_of(folder)))
    started_s = time.monotonic()
    cluster, commits = Cluster(folder), Commits(store)
    trial = Chaos(cluster, run_file, commits, options.seed)
    try:
        cluster.start()
        commits.start()
        trial.run(options.kills)
        trial.finish()
        commits.stop()
    finally:
        cluster.kill_all()
    fire_s = time.monotonic() - started_s
    run = run_files.parse(tree_of(folder), [f"data.views.count={trial.num_views}"])
    noted, found = num_noted(notes_of(folder)), counts(run)
    return {
        "kills": options.kills,
        **{f"kills, {kind}": len(seconds) for kind, seconds in trial.recovery_s.items()},
        **{f"s to the next chunk, {kind}": statistics.median(seconds) for kind, seconds in trial.recovery_s.items()},
        "wall_s": fire_s,
        "driver_starts": trial.driver.starts,
        "driver_ends": dict(trial.driver.ends),
        "tracebacks": trial.driver.tracebacks,
        "drivers_hung": trial.hung,
        **found,
        "rewritten": dict(commits.rewritten),
        "redone": noted - found["labelled"],
        "bound": IN_FLIGHT * CHUNK_SIZE * options.kills,
        **compared(run, folder / "again", NUM_CPUS // TEACHER_ACTORS, options.compare),
    }


def _parent(process: psutil.Process) -> psutil.Process | None:
    with suppress(psutil.Error):
        return process.parent()
    return None


if __name__ == "__main__":
    main()
