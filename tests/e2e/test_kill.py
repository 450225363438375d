"""SIGKILL of the driver, then the same command again: nothing is lost, nothing is done twice, and the results are those of a quiet run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from unittest.mock import Mock

import harness
import pytest

from vkd import pipeline
from vkd.planning import Plan
from vkd.store.labelset import LabelSet

ENDS_WITHIN_S = 20.0  # processes of a killed driver


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_video: Path) -> harness.Tree:
    tree = harness.small_run(tmp_path_factory.mktemp("killed"), tiny_video)
    tree["data"] |= {"clips": {"plan": "windows", "length_s": 1.0, "stride_s": 0.3}, "chunk_size": 2}
    tree["train"]["epochs"] = 12
    return tree


def chunk_files(store: Path) -> set[str]:
    return {str(path.relative_to(store)) for path in store.rglob("chunk-*.parquet")}


@pytest.mark.usefixtures("local_ray")
def test_label_goes_on_after_its_driver_is_killed(tree: harness.Tree, tmp_path: Path) -> None:
    quiet, killed = Path(tree["labels"]["store"]), tmp_path / "labels"
    run_file = harness.write({**tree, "labels": {"store": str(killed)}}, tmp_path / "run.yaml")
    with harness.vkd("label", run_file) as first:
        first.until(lambda: list(killed.glob("teacher-*/view=0/*/chunk-*")))
        first.process.kill()
        killed_at = time.monotonic()
        there = chunk_files(killed)
        with harness.vkd("label", run_file, "--json") as second:  # at once, beside what the first one left
            code, stdout, stderr = second.finish()
        while [pid for pid in first.left_behind() if b"MapWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()]:
            assert time.monotonic() - killed_at < ENDS_WITHIN_S, "workers of a killed driver go on"
    assert code == 0, stderr
    report = pipeline.label(harness.parsed(tree), Mock())
    done = json.loads(stdout)
    assert (done["planned"], done["labelled"], done["present"]) == (report.planned, report.planned - done["present"], done["present"])
    assert there < chunk_files(quiet) == chunk_files(killed)
    for folder in quiet.iterdir():
        expected, found = LabelSet.at(str(folder)), LabelSet.at(str(killed / folder.name))
        for chunk in Plan.of(harness.parsed(tree)).chunks:
            assert found.read(0, chunk, verify=True).equals(expected.read(0, chunk)), (folder.name, chunk)


@pytest.mark.usefixtures("local_ray")
def test_distill_goes_on_after_it_is_killed(tree: harness.Tree, tmp_path: Path) -> None:
    run = harness.parsed(tree)
    pipeline.label(run, Mock())
    quiet = pipeline.distill(run, Mock())
    killed = tmp_path / "out"
    run_file = harness.write({**tree, "output": str(killed)}, tmp_path / "run.yaml")
    with harness.vkd("distill", run_file) as first:
        first.until(lambda: list(killed.glob("attempts/*/step-*/DONE")))
        first.process.kill()
    assert not (killed / "student").exists()
    with harness.vkd("distill", run_file, "--json") as second:
        code, stdout, stderr = second.finish()
    assert code == 0, stderr
    done = json.loads(stdout)
    assert 0 < done["resumed_from"] < done["num_steps"] == quiet.num_steps
    assert done["num_examples"] == quiet.num_examples
    assert (killed / "student" / "model.safetensors").read_bytes() == Path(quiet.student, "model.safetensors").read_bytes()
