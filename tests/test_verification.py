"""Checks of a label store: a good one passes, and what lacks, is damaged or no longer true is found."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import fakes
import numpy as np
import pyarrow.parquet as pq
import pytest
import small

from vkd import claim, cli, teacher_use
from vkd.errors import LabelsMissing
from vkd.metrics.teacher_use import Finding
from vkd.planning import FRAMES_ALIAS
from vkd.run import Run
from vkd.schema import Columns
from vkd.verification import SetCheck, list_rejects, verify

NUM_SAMPLED = 10  # of 24 clips


def checks_of(run: Run) -> dict[str, SetCheck]:
    return {check.name.rpartition("-")[0]: check for check in verify(run, 0).sets}


def test_a_good_store_is_whole_and_its_teacher_still_agrees(labelled: Run) -> None:
    found = verify(labelled, NUM_SAMPLED)
    assert found.ok
    assert [(c.planned, c.labelled, c.rejected, c.missing, c.damaged) for c in found.sets] == [(24, 24, 0, 0, [])] * 2
    assert found.agreement == pytest.approx({"teacher.logits": 1.0, "teacher.embedding": 1.0}, abs=1e-5)
    assert found.sets[0].cells()[1:] == ("0", "24", "24", "0", "0", "0")


@pytest.mark.parametrize("encodings", ["{}", "{logits: 'topk:3', embedding: int8}"])
def test_lossy_encodings_still_agree(unlabelled: Run, tmp_path: Path, encodings: str) -> None:
    run = small.changed(unlabelled, f"labels.store={tmp_path}", f"labels.encodings={encodings}", "data.keep_frames=none")
    small.label(run)
    assert verify(run, NUM_SAMPLED).agreement["teacher.embedding"] > 0.999


def test_rejects_are_whole_too(spoiled: Run) -> None:
    found = verify(spoiled, NUM_SAMPLED)
    assert found.ok
    assert [(c.planned, c.labelled, c.rejected) for c in found.sets] == [(24, 16, 8)] * 2
    assert set(found.agreement) == {"teacher.logits", "teacher.embedding"}


def test_agreement_is_only_told_of_labels_that_were_compared(unlabelled: Run, tmp_path: Path) -> None:
    run = small.changed(unlabelled, f"labels.store={tmp_path}", "recipe.teacher='fakes:NotFinite'", "data.keep_frames=none")
    small.label(run)
    for path in small.chunk_files(run, "teacher")[1:]:
        path.unlink()
    assert verify(run, 1).agreement == {}  # the one clip that is drawn was rejected


def test_rejects_are_listed_with_their_reasons(spoiled: Run, labelled: Run) -> None:
    rejects = list_rejects(spoiled)
    assert len(rejects) == 8
    assert {(Path(r.clip).name, r.stage, r.kind) for r in rejects} == {("b_dull.mp4", "decode", "not_a_video")}
    assert all(reject.message and reject.message in str(reject) for reject in rejects)
    assert {str(reject).split(": ")[1].split(" (")[0] for reject in rejects} == {"decode not_a_video"}
    assert list_rejects(labelled) == []


@pytest.mark.parametrize("alias", ["teacher", FRAMES_ALIAS])
@pytest.mark.parametrize("num_sampled", [0, NUM_SAMPLED])
def test_a_missing_chunk_is_found(labelled: Run, tmp_path: Path, alias: str, num_sampled: int) -> None:
    run = small.copied(labelled, tmp_path)
    small.chunk_files(run, alias)[1].unlink()
    assert not verify(run, num_sampled).ok
    check = checks_of(run)[alias]
    assert (check.missing, check.labelled, check.damaged) == (1, 19, [])


@pytest.mark.parametrize("alias", ["teacher", FRAMES_ALIAS])
@pytest.mark.parametrize("num_sampled", [0, NUM_SAMPLED])
@pytest.mark.parametrize("from_end", [1, 5])
def test_a_flipped_byte_is_found(labelled: Run, tmp_path: Path, alias: str, num_sampled: int, from_end: int) -> None:
    run = small.copied(labelled, tmp_path)
    path = small.chunk_files(run, alias)[1]
    data, group = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0)
    column = max((group.column(i) for i in range(group.num_columns)), key=lambda column: column.total_compressed_size)
    data[column.data_page_offset + column.total_compressed_size - from_end] ^= 0x55  # values: page headers have bytes that mean nothing
    path.write_bytes(data)
    found = verify(run, num_sampled)
    assert not found.ok
    check = checks_of(run)[alias]
    assert (check.missing, check.labelled, len(check.damaged)) == (0, 19, 1)
    assert path.name in check.damaged[0]
    assert path.name in check.cells()[-1]


def test_a_teacher_that_changed_is_found(labelled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = fakes.TinyTeacher.labels

    def other(self: fakes.TinyTeacher, frames: np.ndarray) -> Columns:
        labels = answer(self, frames)
        return labels | {"embedding": labels["embedding"][:, ::-1]}

    monkeypatch.setattr(fakes.TinyTeacher, "labels", other)
    found = verify(labelled, NUM_SAMPLED)
    assert not found.ok
    assert found.agreement["teacher.embedding"] < 0.9
    assert found.agreement["teacher.logits"] > 0.999
    assert verify(labelled, 0).ok


def test_a_view_that_lacks_is_missing(labelled: Run) -> None:
    found = verify(small.changed(labelled, "data.views.count=2"), 0)
    assert [(check.view, check.missing) for check in found.sets] == [(0, 0), (1, 5)] * 2
    assert not found.ok


def test_no_labels_names_the_command(unlabelled: Run, tmp_path: Path) -> None:
    with pytest.raises(LabelsMissing, match="vkd label RUN"):
        verify(small.changed(unlabelled, f"labels.store={tmp_path}"), 0)


def test_a_set_without_a_chunk_is_all_missing(labelled: Run, tmp_path: Path) -> None:
    run = small.copied(labelled, tmp_path)
    for path in small.chunk_files(run, "teacher"):
        path.unlink()
    assert checks_of(run)["teacher"].missing == 5
    assert verify(run, NUM_SAMPLED).agreement == {}


def test_a_student_that_does_not_use_its_teacher_is_found(labelled: Run, tmp_path: Path) -> None:
    run = small.changed(labelled, f"output={tmp_path}")
    assert verify(run, 0).unused == []
    found = Finding("drowned", "cosine", "1e-06 of the gradient", "raise its weight, or set it to 0")
    document = {"step": 120, "judged": True, "max_gradient_share": {"cosine": 1e-6}, "findings": [asdict(found)]}
    (tmp_path / teacher_use.FILE).write_text(json.dumps(document))
    verification = verify(run, 0)
    assert (verification.ok, verification.labels_ok, verification.unused) == (False, True, [found])
    (tmp_path / teacher_use.FILE).write_text(json.dumps(document | {"findings": []}))
    assert verify(run, 0).ok


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_tells_it_and_fails(
    labelled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], as_json: bool
) -> None:
    found = Finding("unused", "kl", "0.38 with the teacher's labels, 0.38 with those of other clips", "check that they belong together")
    document = {"step": 120, "judged": True, "max_gradient_share": {}, "findings": [asdict(found)]}
    (tmp_path / teacher_use.FILE).write_text(json.dumps(document))
    path = small.write(labelled.model_dump(mode="json") | {"output": str(tmp_path)}, tmp_path / "run.yaml")
    monkeypatch.setattr("sys.argv", ["vkd", "verify", str(path), "--sample", "0", *(["--json"] if as_json else [])])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert ended.value.code == 2
    assert err.endswith(f"vkd: {tmp_path}: the teacher is not used as it should be, see above: kl -> {found.action}\n")
    assert f"teacher not used, {found}" in (err if as_json else out)
    if as_json:
        answer = json.loads(out.splitlines()[-1])
        assert (answer["ok"], answer["teacher_use"]) == (False, [asdict(found)])


def test_training_leaves_its_findings_for_verify(labelled: Run, tmp_path: Path) -> None:
    from vkd import training  # imports Ray, which takes seconds

    run = small.changed(labelled, f"output={tmp_path}", "train.epochs=1", "recipe.weights={kl: 1.0, cosine: 1.0e-6}")
    training.train(run, lambda report: None)
    document = teacher_use.load(run.output)
    assert document is not None
    assert (document["step"], document["judged"]) == (2, False)
    assert [finding.where for finding in verify(run, 0).unused] == ["cosine"]
    claim.claim_output(small.changed(run, "train.check_every_steps=7"))  # decides no weight
    training.train(small.changed(run, f"output={tmp_path}/none", "train.check_every_steps=0"), lambda report: None)
    assert teacher_use.load(f"{tmp_path}/none") is None
