"""`vkd whiten`: what it fits, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small

from vkd import planning
from vkd.planning import Plan
from vkd.run import Run, dump
from vkd.schema import EXAMPLE_ID, TRAIN
from vkd.store.labelset import ChunkRows, LabelSet, Reject
from vkd.whitening import Covariance, Whitening
from vkd.whitening_fit import fit

Main = Callable[..., tuple[int, str, str]]
REJECTED = 3  # row of every chunk


def regions_of(example_id: str, view: int) -> np.ndarray:
    """Features of 1 to 4 frames, as half precision keeps them."""
    rng = np.random.default_rng([int(example_id, 16), view])
    return (rng.normal(size=(rng.integers(1, 5), 9, 8)) * np.geomspace(1, 0.1, 8)).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def stored(unlabelled: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of TinyRegions with regions of two views in its store. Read only."""
    folder = tmp_path_factory.mktemp("regions")
    changes = ["recipe.teacher=fakes:TinyRegions", "labels.encodings={}", "recipe.weights={kl: 0, cosine: 0, cross_entropy: 1}"]
    run = small.changed(unlabelled, *changes, f"labels.store={folder}", "data.views.count=2", "data.keep_frames=none")
    spec = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))["teacher"]
    label_set, plan = LabelSet.create(run.labels.store, spec, {}, {}, {}), Plan.of(run)
    for chunk in plan.chunks:
        ids = plan.examples(chunk)[EXAMPLE_ID].to_pylist()
        rejects = {REJECTED: Reject("decode", "missing", "gone", True)}
        for view in range(2):
            rows = [None if row in rejects else regions_of(example_id, view) for row, example_id in enumerate(ids)]
            label_set.write(view, chunk, ChunkRows(ids, rejects, {"regions": rows}))
    return run


@pytest.fixture
def whiten(main: Main, tmp_path: Path) -> Main:
    """`vkd whiten` of a run with these options."""

    def call(run: Run, *options: object) -> tuple[int, str, str]:
        (tmp_path / "run.yaml").write_text(dump(run))
        return main("whiten", tmp_path / "run.yaml", tmp_path / "whitening.safetensors", *options)

    return call


def test_it_fits_all_stored_views_of_the_train_split(stored: Run, whiten: Main, tmp_path: Path) -> None:
    code, out, err = whiten(stored, "--dims", "5", "--json")
    told, plan, rows = json.loads(out), Plan.of(stored), []
    for chunk, train in zip(plan.chunks, plan.rows(TRAIN), strict=True):
        ids = plan.examples(chunk)[EXAMPLE_ID].to_pylist()
        rows += [regions_of(ids[row], view) for row in train if row != REJECTED for view in range(2)]
    vectors = np.concatenate(rows).reshape(-1, 8)
    assert (code, told["clips"], told["vectors"], told["num_channels"], told["dims"]) == (0, len(rows) // 2, len(vectors), 8, 5)
    values, directions = np.linalg.eigh(np.cov(vectors.T.astype(np.float64), ddof=0))
    assert told["variance"] == pytest.approx(values[3:].sum() / values.sum(), rel=1e-5)
    data = (tmp_path / "whitening.safetensors").read_bytes()
    found = Whitening.from_bytes(data)
    np.testing.assert_allclose(found.eigenvalues, values[:2:-1], rtol=1e-4)
    np.testing.assert_allclose(np.abs((found.vectors * directions[:, :2:-1]).sum(axis=0)), 1, atol=1e-4)
    assert found.num_vectors == len(vectors)
    assert f"whitening: {tmp_path}/whitening.safetensors" in err and told["alias"] == "teacher"
    whiten(stored, "--dims", "5")
    assert (tmp_path / "whitening.safetensors").read_bytes() == data
    code, _, err = whiten(stored, "--dims", "4")  # labels may name the first one
    assert (code, (tmp_path / "whitening.safetensors").read_bytes()) == (2, data)
    assert re.search(r"whitening.safetensors: this file was fitted on something else.* -> name another file", err), err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dims", "9"], r"vectors of 8 values span 8 dims; 9 are asked"),
        (["--dims", "0"], r"Invalid value for '--dims'"),
        (["labels.mode=live"], "labels.mode: mode live keeps no labels"),
        (["recipe.teacher.whitening=w"], r"recipe\.teacher\.whitening: its regions are whitened already"),
        (["recipe.teacher=fakes:Counts"], "emits no 'regions' of frames, but counts"),
        (["labels.store=/nowhere"], r"no labels teacher-.* -> vkd label .*run\.yaml"),
        (["data.views.count=3"], "labels of 5 of 5 chunks are missing -> vkd label"),
    ],
)
def test_what_cannot_be_fitted_is_told_in_one_line(stored: Run, whiten: Main, tmp_path: Path, options: list[str], says: str) -> None:
    code, _, err = whiten(stored, *options)
    assert code == 2 and err.count("\n") == 1
    assert re.search(says, err), err
    assert not (tmp_path / "whitening.safetensors").exists()


def test_a_budget_holds_for_runs_that_train_nothing(stored: Run, main: Main, tmp_path: Path) -> None:
    tree = stored.model_dump(mode="json") | {"output": str(tmp_path / "out"), "whitening": {"out": str(tmp_path / "w"), "dims": 4}}
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    code, _, err = main("run", tmp_path / "run.yaml", "--max-hours", "0")
    assert code == 4 and "stopped: 0.00 hours are over" in err


def test_part_of_the_labels_is_taken_when_that_is_allowed(stored: Run, whiten: Main, tmp_path: Path) -> None:
    run = small.copied(stored, tmp_path)
    small.chunk_files(run, "teacher")[0].unlink()
    code, _, err = whiten(run, "--dims", "4")
    assert code == 2 and "labels of 1 of 5 chunks are missing" in err
    code, out, _ = whiten(run, "--dims", "4", "labels.allow_partial=true", "--json")
    assert code == 0 and json.loads(out)["dims"] == 4


def test_one_video_is_in_double_precision_at_a_time(stored: Run, whiten: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, add = list[int](), Covariance.add
    monkeypatch.setattr(Covariance, "add", lambda self, block: (seen.append(len(block)), add(self, block))[1])
    assert whiten(stored, "--dims", "2")[0] == 0
    assert max(seen) <= 4 * 9


def test_a_run_with_the_section_labels_and_fits(stored: Run, main: Main, tmp_path: Path) -> None:
    """All is labelled, so nothing is started."""
    run = small.changed(stored, f"whitening={{out: {tmp_path}/whitening.safetensors, dims: 3}}", f"output={tmp_path}/out")
    (tmp_path / "run.yaml").write_text(dump(run))
    code, out, _ = main("run", tmp_path / "run.yaml", "--json")
    told = json.loads(out)["small"]
    assert (code, told["whitening"]["dims"], set(told)) == (0, 3, {"label", "whitening"})
    assert len(Whitening.from_bytes((tmp_path / "whitening.safetensors").read_bytes()).eigenvalues) == 3


def test_it_is_fitted_once(stored: Run, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    first = fit(stored, str(out), 4)
    before = out.stat().st_mtime_ns
    assert fit(stored, str(out), 4) == first and out.stat().st_mtime_ns == before
    out.unlink()
    assert fit(stored, str(out), 3).dims == 3 and out.exists()
