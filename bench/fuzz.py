"""A thousand damaged files and the whole corpus in one manifest, through the real pipeline: nothing stops, nothing is lost.

    python bench/fuzz.py --json                  1,000 files (tests/fuzz/damage.py) beside wagon, weizmann and natural
    python bench/fuzz.py --files 100 --folders weizmann

Every intact clip must be labelled; every damaged one labelled (the damage spared what is shown) or rejected with a reason. Then
each damaged file is decoded once more by itself: the slowest against its deadline.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import arguments, corpus, finish

from vkd import labelling, planning, schema, verification
from vkd import run as run_files
from vkd.clips import Clip, View
from vkd.console import Screen
from vkd.errors import VideoError
from vkd.manifest import BuildOptions, Manifest, build
from vkd.planning import Plan
from vkd.run import Run
from vkd.video.guard import Guard

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "fuzz"))
import damage  # type: ignore[import-not-found]  # shared with the tests

DAMAGED = "damaged"


def main() -> None:
    options = arguments(__doc__ or "", files=1000, seed=0, folders="wagon,weizmann,natural")
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vkd-fuzz-") as name:
        folder = Path(name)
        intact = clips_of(options.folders.split(","))
        sources = damage.write_sources(damage.smallest(corpus()), folder / "sources")
        damaged = damage.write_damaged(sources, folder / DAMAGED, options.files, options.seed)
        (folder / "list.txt").write_text("".join(f"{path}\n" for path in [*intact, *damaged]))
        run = _run(folder)
        build(run.data.source or "", run.data.manifest, BuildOptions(chunk_size=16, allow=run.data.allow))
        report = labelling.label(run, Plan.of(run).chunks, lambda report: None)
        result = told(run, set(map(str, intact))) | {"label_s": report.wall_s}
        result |= slowest(run, damaged) | {"wall_s": time.monotonic() - started_s}
    finish(result, options.json)


def clips_of(folders: Sequence[str]) -> list[Path]:
    """The intact clips of the corpus that its own list names."""
    lines = (corpus() / "MANIFEST.tsv").read_text().splitlines()[1:]
    return [corpus() / path for path in (line.split("\t")[0] for line in lines) if path.split("/")[0] in folders]


def told(run: Run, intact: set[str]) -> dict[str, Any]:
    """What became of every file; the reasons as a table."""
    found = Manifest.load(run.data.manifest).rejects()
    at_manifest = dict(zip(found[schema.URI].to_pylist(), found["kind"].to_pylist(), strict=True))
    plan = Plan.of(run)
    planned = [uri for chunk in plan.chunks for uri in plan.examples(chunk)[schema.URI].to_pylist()]
    at_label = {each.clip: each.kind for each in verification.list_rejects(run) if each.stage != "manifest"}
    reasons = (Counter(at_manifest.values()), Counter(at_label.values()))
    rows = [(kind, str(reasons[0][kind]), str(reasons[1][kind])) for kind, _ in (reasons[0] + reasons[1]).most_common()]
    Screen().table("rejected", ("reason", "when listed", "when decoded"), rows)
    check = verification.verify(run, num_sampled=0)
    labelled = set(planned) - set(at_label)
    return {
        "files": len(planned) + len(at_manifest),
        "planned": len(planned),
        "labelled": check.sets[0].labelled,
        "rejected_when_listed": reasons[0].total(),
        "rejected_when_decoded": reasons[1].total(),
        "rejected": dict(reasons[0] + reasons[1]),
        "intact": len(intact),
        "intact_labelled": len(intact & labelled),
        "damaged_labelled": len(labelled - intact),
        "lost": sum(each.planned - each.labelled - each.rejected for each in check.sets) + len(check.sets[0].damaged),
    }


def slowest(run: Run, damaged: Sequence[Path]) -> dict[str, Any]:
    """Seconds of the slowest damaged file by itself, in a child that has started, beside its deadline; files over theirs."""
    samplings = [teacher.sampling for teacher in planning.build_teachers(run.recipe.teachers).values() if teacher.sampling is not None]
    decoder, found = Guard(planning.decoding(run, samplings)), []
    for path in damaged:
        clip = Clip(str(path), 0.0, None, View(), path.name)
        limit_s, started_s = decoder.settings.limits.of(clip), time.monotonic()
        (answer,) = decoder.decode([clip])
        found.append((time.monotonic() - started_s, limit_s, path.name, answer.kind if isinstance(answer, VideoError) else schema.LABELLED))
    decoder.close()
    seconds, deadline_s, name, became = max(found)
    over = sum(spent_s > limit_s for spent_s, limit_s, _, _ in found)
    return {"slowest_s": seconds, "slowest_deadline_s": deadline_s, "slowest": f"{name}: {became}", "over_deadline": over}


def _run(folder: Path) -> Run:
    tree = {
        "name": "fuzz",
        "output": str(folder / "out"),
        "data": {
            "manifest": str(folder / "manifest"),
            "source": str(folder / "list.txt"),
            "allow": [os.fspath(corpus()), os.fspath(folder)],
            "max_reject_fraction": 1.0,
        },
        "labels": {"store": str(folder / "labels")},
        "recipe": {
            "name": "kd",
            "teacher": {"name": "efficientnet_lite", "num_frames": 1},
            "student": {"name": "shift_cnn", "num_frames": 2, "size_px": 32},
        },
        "compute": {"decode": {"deadline_s": 30, "max_memory_bytes": 2 << 30}},
    }
    return run_files.parse(json.loads(json.dumps(tree)))


if __name__ == "__main__":
    main()
