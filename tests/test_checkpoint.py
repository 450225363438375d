"""Checkpoints give back every bit, only finished ones count, and exported students load without anything else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import paired
import pytest
import small
import torch
from torch import nn

from vkd import checkpoint, models
from vkd.checkpoint import BEST, CONFIG, DONE, OPTIMIZER, STATE, WEIGHTS, Best, Position, Saver
from vkd.errors import ConfigError, StorageError
from vkd.models import ModelSpec
from vkd.store import files
from vkd.students import STUDENTS
from vkd.students.base import Student
from vkd.students.selector import Selector

SPEC = ModelSpec(name="shift_cnn", options={"num_frames": 2, "size_px": 16})
HEADS = {"logits": 3}


def student_of(seed: int, heads: Mapping[str, int] = HEADS) -> Student:
    torch.manual_seed(seed)
    student: Student = models.build(SPEC, STUDENTS, "student", heads=heads)
    return student


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01)


def train(student: Student, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        frames = torch.randint(0, 256, (2, 2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        student(frames)["logits"].square().sum().backward()
        optimizer.step()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """The folder of one finished checkpoint."""
    student = student_of(0)
    optimizer = optimizer_of(student)
    train(student, optimizer, range(2))
    small.save_checkpoint(str(tmp_path / "attempts" / "a"), Position(1, 2, 3, 4), student, optimizer)
    return str(tmp_path / "attempts" / "a" / "step-000000003")


def finish(output: Path, attempt: str, step: int, *, done: bool = True) -> str:
    """An empty checkpoint's folder."""
    folder = output / "attempts" / attempt / f"step-{step:09d}"
    for name in [WEIGHTS, OPTIMIZER, STATE, *([DONE] if done else [])]:
        files.put(str(folder / name), b"")
    return str(folder)


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    student = student_of(0)
    optimizer = optimizer_of(student)
    train(student, optimizer, range(3))
    position = Position(epoch=2, round=1, step=3, num_examples=6)
    attempt = checkpoint.new_attempt(str(tmp_path))
    small.save_checkpoint(attempt, position, student, optimizer)
    train(student, optimizer, range(3, 6))

    other = student_of(1)
    other_optimizer = optimizer_of(other)
    found = checkpoint.newest(str(tmp_path))
    assert found == f"{attempt}/step-000000003"
    assert checkpoint.restore(found, other, other_optimizer) == position
    train(other, other_optimizer, range(3, 6))
    assert_same(student, other)
    assert_same_state(optimizer.state_dict(), other_optimizer.state_dict())


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["param_groups"] == b["param_groups"]
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)


def test_the_newest_has_the_most_steps_of_any_attempt(tmp_path: Path) -> None:
    assert checkpoint.newest(str(tmp_path)) is None
    finish(tmp_path, "1", 10)
    most = finish(tmp_path, "1", 30)
    finish(tmp_path, "2", 20)
    assert checkpoint.newest(str(tmp_path)) == most
    later = finish(tmp_path, "2", 30)
    assert checkpoint.newest(str(tmp_path)) == later


def test_a_checkpoint_that_is_not_done_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = finish(tmp_path, "1", 10)
    finish(tmp_path, "1", 20, done=False)
    files.put(str(tmp_path / "attempts" / "1" / "notes.txt"), b"")
    assert checkpoint.newest(str(tmp_path)) == kept

    student = student_of(0)
    write = files.put
    written: list[str] = []

    def until_done(uri: str, data: bytes) -> None:
        if uri.endswith(DONE):
            raise KeyboardInterrupt
        written.append(uri.rsplit("/", 1)[-1])
        write(uri, data)

    monkeypatch.setattr(files, "put", until_done)
    with pytest.raises(KeyboardInterrupt):
        small.save_checkpoint(str(tmp_path / "attempts" / "2"), Position(step=40), student, optimizer_of(student))
    assert set(written) == {WEIGHTS, OPTIMIZER, STATE}
    assert checkpoint.newest(str(tmp_path)) == kept


def test_attempts_sort_by_time(tmp_path: Path) -> None:
    attempts = [checkpoint.new_attempt(str(tmp_path)) for _ in range(20)]
    assert attempts == sorted(attempts)
    assert len(set(attempts)) == 20


def test_prune_keeps_the_newest_and_what_is_not_done(tmp_path: Path) -> None:
    old = [finish(tmp_path, "1", 1), finish(tmp_path, "2", 2)]
    kept = [finish(tmp_path, "1", 3), finish(tmp_path, "2", 4)]
    running = finish(tmp_path, "3", 0, done=False)
    checkpoint.prune(str(tmp_path), 2)
    assert [folder for folder in [*old, *kept, running] if files.exists(folder)] == [*kept, running]
    checkpoint.prune(str(tmp_path), 5)
    assert files.exists(kept[0])


def test_the_best_is_kept_too(tmp_path: Path) -> None:
    student = student_of(0)
    for step, loss in enumerate([3.0, 1.0, 1.0, 2.0, 2.5]):
        contents = checkpoint.snapshot(Position(step=step), student, optimizer_of(student), loss)
        checkpoint.save(str(tmp_path / "attempts" / "a"), step, contents)
    checkpoint.prune(str(tmp_path), 1)
    assert sorted(path.name for path in (tmp_path / "attempts" / "a").iterdir()) == ["step-000000002", "step-000000004"]
    found = checkpoint.best(str(tmp_path))
    assert found is not None and found.endswith("step-000000002")


def test_the_best_weights_of_a_phase_are_kept_beside_the_newest(tmp_path: Path) -> None:
    student, other = student_of(0), student_of(1)
    for step, best in enumerate([None, Best(2, 0.5, other.state_dict()), Best(3, math.inf, other.state_dict())]):
        contents = checkpoint.snapshot(Position(step=step), student, optimizer_of(student), best=best)
        checkpoint.save(str(tmp_path), step, contents)
        assert list(contents)[-2:] == [STATE, DONE]
        found = checkpoint.best_of_phase(f"{tmp_path}/step-{step:09d}")
        if best is None:
            assert found is None
            continue
        assert found is not None and (found.phase, found.score) == (best.phase, best.score)
        torch.testing.assert_close(dict(found.weights), dict(other.state_dict()), rtol=0, atol=0)
    folder = f"{tmp_path}/step-000000001"
    files.put(f"{folder}/{BEST}", b"garbage" * 100)
    with pytest.raises(StorageError, match=f"{BEST} is damaged"):
        checkpoint.best_of_phase(folder)


def test_saving_beside_training_tells_what_went_wrong(tmp_path: Path) -> None:
    def fail() -> None:
        raise StorageError("the disk is full")

    done, saver = list[int](), Saver()
    saver.submit(lambda: done.append(1))
    saver.flush()
    saver.submit(fail)
    with pytest.raises(StorageError, match="full"):
        saver.submit(lambda: done.append(2))
    assert done == [1]
    saver.close()


def test_prune_takes_the_mark_away_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(tmp_path, "1", 1)
    newest = finish(tmp_path, "1", 2)
    deleted: list[str] = []
    monkeypatch.setattr(files, "delete", deleted.append)
    checkpoint.prune(str(tmp_path), 1)
    assert [Path(uri).name for uri in deleted] == [DONE, "step-000000001"]
    assert newest not in deleted


def test_an_exported_student_loads_alone(tmp_path: Path) -> None:
    student = student_of(0, {"logits": 3, "embedding": 5})
    checkpoint.export(student, SPEC, str(tmp_path), {"trained": {"step": 7}})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CONFIG, WEIGHTS])
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["student"] == {"name": "shift_cnn", "num_frames": 2, "size_px": 16}
    assert config["heads"] == {"logits": 3, "embedding": 5}
    assert config["trained"] == {"step": 7}
    assert config["sampling"] == student.sampling.model_dump(mode="json")
    loaded = checkpoint.load_student(str(tmp_path))
    assert_same(loaded, student)
    assert not loaded.training


def test_a_folder_without_a_student_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no exported student -> vkd distill RUN"):
        checkpoint.load_student(str(tmp_path))


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100, None])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
def test_damaged_files_say_which_and_what_to_do(saved: str, name: str, damage: bytes | None) -> None:
    whole = files.read(f"{saved}/{name}")
    files.put(f"{saved}/{name}", whole[: len(whole) // 2] if damage is None else damage)
    student = student_of(0)
    with pytest.raises(StorageError, match=f"{name} is damaged.*delete this folder, then run the same command again") as raised:
        checkpoint.restore(saved, student, optimizer_of(student))
    assert raised.value.where == saved


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_damaged_export_says_so(tmp_path: Path, name: str) -> None:
    checkpoint.export(student_of(0), SPEC, str(tmp_path), {})
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    with pytest.raises(StorageError, match=f"{name} is damaged"):
        checkpoint.load_student(str(tmp_path))


def test_a_similarity_student_loads_alone_and_as_nothing_else(tmp_path: Path) -> None:
    fine, frames = paired.exported(tmp_path / "fine", "fine", "regions-1"), str(tmp_path / "frames")
    checkpoint.export(student_of(0), SPEC, frames, {})
    loaded = checkpoint.load_similarity(fine)
    assert not loaded.training
    assert checkpoint.read_export(fine)[0]["features"] == "regions-1"
    selector = paired.exported(tmp_path / "selector", "selector", "regions-1")
    assert isinstance(checkpoint.load_similarity(selector), Selector)
    for load, folder, what in (
        (checkpoint.load_similarity, frames, "'shift_cnn' is no such student -> name the folder of one that learned similarity"),
        (checkpoint.load_student, fine, "'fine' is no such student"),
        (checkpoint.load_similarity, str(tmp_path / "none"), "holds no exported student -> vkd distill RUN"),
    ):
        with pytest.raises(ConfigError, match=what) as raised:
            load(folder)
        assert raised.value.where == folder
    files.put(f"{fine}/{WEIGHTS}", files.read(f"{selector}/{WEIGHTS}"))
    with pytest.raises(ConfigError, match="the weights do not fit the model"):
        checkpoint.load_similarity(fine)


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"student": {"name": 3}}', "\x00"])
def test_an_export_that_tells_no_student_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(StorageError, match=f"{CONFIG} is damaged"):
        checkpoint.read_export(str(tmp_path))


def test_weights_of_another_model_are_refused(saved: str) -> None:
    for heads in ({"logits": 4}, {"embedding": 3}, {}):
        other = student_of(0, heads)
        with pytest.raises(ConfigError, match=r"the weights do not fit the model.*use the recipe that made them"):
            checkpoint.restore(saved, other, optimizer_of(other))


def test_nothing_pickled_is_run(saved: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "evil",))

    torch.save(Evil(), Path(saved) / OPTIMIZER)
    student = student_of(0)
    with pytest.raises(StorageError, match="is damaged"):
        checkpoint.restore(saved, student, optimizer_of(student))
    assert not (tmp_path / "evil").exists()
