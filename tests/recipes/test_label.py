"""Runs that only make labels: the verbs that train refuse them, the others work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import small

from vkd.run import Run, dump
from vkd.verification import verify

Main = Callable[..., tuple[int, str, str]]
RECIPE = "recipe={name: label, models: {colours: 'fakes:TinyRegions'}}"


@pytest.fixture
def run(unlabelled: Run, tmp_path: Path) -> Run:
    changes = [RECIPE, "labels={}", f"labels.store={tmp_path}/labels", f"output={tmp_path}/out", "data.keep_frames=none"]
    return small.changed(unlabelled, *changes)


@pytest.fixture
def run_file(run: Run, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump(run))
    return path


def test_what_needs_a_student_is_refused_in_one_line(main: Main, run_file: Path, tmp_path: Path) -> None:
    code, out, err = main("distill", run_file)
    assert (code, out) == (2, "")
    assert err == f"vkd: recipe.name: recipe 'label' trains nothing -> vkd label {run_file}, or choose a recipe with a student\n"
    for words in (("evaluate", run_file), ("export", run_file, tmp_path / "student")):
        code, _, err = main(*words)
        assert code == 2 and err.count("\n") == 1 and f"vkd distill {run_file}" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "labels").exists()


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("mode", ["tee", "stored"])
def test_it_is_planned_labelled_and_verified(main: Main, run_file: Path, tmp_path: Path, mode: str) -> None:
    code, out, err = main("plan", run_file, f"labels.mode={mode}", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert set(told["checks"]) == {"manifest", "labels", "teachers", "storage", "resources"}
    assert [stage["name"] for stage in told["stages"]] == ["decode", "colours"]
    assert told["total_s"] == pytest.approx(told["start_s"] + told["label_s"]) and told["epoch_s"] == 0
    assert "student" not in err and "epoch" not in err and "slowest: " in err
    assert list((tmp_path / "out").iterdir()) == [] and not (tmp_path / "labels").exists()
    assert main("run", run_file, f"labels.mode={mode}")[0] == 0
    code, out, err = main("verify", run_file, "--rejects", "--json")
    told = json.loads(out)
    assert (code, told["ok"], told["rejects"]) == (0, True, [])
    assert told["agreement"]["colours.regions"] == pytest.approx(1, abs=1e-5)
    code, out, _ = main("plan", run_file)
    assert code == 0 and "0 to label of 24" in out and "slowest" not in out


def test_ragged_labels_of_another_length_do_not_agree(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    small.label(run)
    answer = fakes.TinyRegions.labels

    def shorter(self: fakes.TinyRegions, frames: np.ndarray) -> dict[str, Any]:
        return {"regions": [rows[1:] for rows in answer(self, frames)["regions"]]}

    monkeypatch.setattr(fakes.TinyRegions, "labels", shorter)
    found = verify(run, 3)
    assert found.agreement == {"colours.regions": 0.0} and not found.ok
