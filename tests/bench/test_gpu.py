"""The GPU benchmark where there is none: it says so, and its arms run on a CPU."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vkd.rounds import Round


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    return importlib.import_module("gpu")


def test_without_a_gpu_it_says_so(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json"])
    gpu.main()
    assert "needs a GPU" in json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"]


def test_the_feeder_in_memory_gives_each_chunk_of_each_round_in_order(gpu: ModuleType) -> None:
    batches = [{"weight": torch.full((2 + i,), float(i))} for i in range(12)]
    feeder = gpu.InMemory(batches)
    rounds = [Round(0, 0, tuple(range(5, 12))), Round(0, 1, tuple(range(5)))]
    fed = list(feeder.stream(rounds, 2, 0))
    assert [f.batch["weight"].tolist() for f in fed] == [batches[i]["weight"].tolist() for i in (*range(5, 12), *range(5))]
    assert [f.num_examples for f in fed] == [feeder.sizes[i] for i in (*range(5, 12), *range(5))]
    assert [f.last for f in fed] == [False] * 6 + [True] + [False] * 4 + [True]
    assert all(f.batch["weight"] is not batches[i]["weight"] for i, f in zip((*range(5, 12), *range(5)), fed, strict=True))


def test_both_training_arms_run(gpu: ModuleType) -> None:
    options = argparse.Namespace(device="cpu", student="small", train_batch=2, batches=2, epochs=1, repeats=2)
    found = gpu.measure_train(options)
    assert found["train_ratio_spread"]["repeats"] == 2
    assert found["train_ratio_spread"]["low"] <= found["train_ratio"] <= found["train_ratio_spread"]["high"]


def test_a_random_teacher_answers(gpu: ModuleType) -> None:
    teacher = gpu.random_teacher("cpu", 1)
    assert teacher.precision == "bf16"
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
