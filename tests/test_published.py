"""Published checkpoints become exports that give what the reference's weights give."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import hashed
import paired
import pytest
import torch
from students.test_selector import MLP
from torch import Tensor

from vkd import checkpoint, published
from vkd.errors import ConfigError
from vkd.run import Run, dump
from vkd.schema import TensorType
from vkd.similarity_layers import load_renamed
from vkd.students.coarse import CoarseStudent

STATES: Mapping[str, Callable[[], dict[str, Tensor]]] = {
    "fine_attention": lambda: hashed.parameters(hashed.ATTENTION | hashed.comparator("visil_head.")),
    "fine_binary": lambda: hashed.parameters({"binarization.W": (512, 512)} | hashed.comparator("visil_head.")),
    "selector": lambda: hashed.parameters(hashed.ATTENTION | hashed.comparator("visil_head.") | MLP) | _statistics(),
    "visil_symmetric": lambda: hashed.parameters({"attention.context_vector.weight": (1, 512)} | hashed.comparator("video_comperator.")),
}


class Wide(paired.Regions):
    """Regions of as many values as the published networks take."""

    @property
    def emits(self) -> Mapping[str, TensorType]:
        return {"regions": TensorType("float32", (None, 9, 512))}


def _statistics() -> dict[str, Tensor]:
    found = {}
    for layer in (1, 5):
        found |= {f"mlp.model.{layer}.running_mean": torch.zeros(100), f"mlp.model.{layer}.running_var": torch.ones(100)}
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return paired.run_of(tmp_path, [paired.table_of([{"video_id": "v", "uri": "v.mp4"}])], "recipe.teacher=test_published:Wide")


def saved(folder: Path, network: str) -> str:
    torch.save({"model": STATES[network](), "global_step": 7, "args": argparse.Namespace(dims=512)}, folder / f"{network}.pth")
    return str(folder / f"{network}.pth")


@torch.no_grad()
@pytest.mark.parametrize("network", STATES)
def test_an_export_gives_what_the_weights_give(run: Run, tmp_path: Path, network: str) -> None:
    told = published.adopt(run, saved(tmp_path, network), network, str(tmp_path / "out"))
    reference = published.NETWORKS[network]
    expected = reference.load(STATES[network](), **reference.options, num_dims=512).float().eval()
    found = checkpoint.load_similarity(str(tmp_path / "out"))
    x = hashed.query()[None].float()
    torch.testing.assert_close(found.index(x), expected.index(x))
    assert checkpoint.read_export(str(tmp_path / "out"))[0]["features"] == told["features"]
    assert told["parameters"] == sum(p.numel() for p in expected.parameters())


def test_the_coarse_one_has_other_names(run: Run, tmp_path: Path) -> None:
    student = CoarseStudent()
    state = {
        name.replace("assign", "conv").replace("netvlad.reduce", "netvlad.reduction_layer"): x for name, x in student.state_dict().items()
    }
    state["netvlad.conv.weight"] = state["netvlad.conv.weight"][:, :, None, None]
    torch.save(state, tmp_path / "coarse.pth")
    published.adopt(run, str(tmp_path / "coarse.pth"), "coarse", str(tmp_path / "out"))
    found = checkpoint.load_similarity(str(tmp_path / "out"))
    assert all(torch.equal(x, y) for x, y in zip(found.state_dict().values(), student.state_dict().values(), strict=True))


def test_what_does_not_fit_is_told(run: Run, tmp_path: Path) -> None:
    out, path = str(tmp_path / "out"), saved(tmp_path, "fine_binary")
    for network, told in (
        ("fine", "'fine' is no network -> choose fine_attention"),
        ("selector", "weights of another network: Missing key"),
    ):
        with pytest.raises(ConfigError) as error:
            published.adopt(run, path, network, out)
        assert told in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "damaged.pth").write_bytes(Path(path).read_bytes()[:1000])
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name, told in (("damaged", "cannot be read as a checkpoint"), ("list", "holds no state dict"), ("none", "no such file")):
        with pytest.raises(ConfigError, match=told):
            published.adopt(run, str(tmp_path / f"{name}.pth"), "coarse", out)
    narrow = paired.run_of(tmp_path / "narrow", [paired.table_of([{"video_id": "v", "uri": "v.mp4"}])])
    with pytest.raises(ConfigError, match=r"for features of 16 dimensions: weights of another network: size mismatch"):
        published.adopt(narrow, path, "fine_binary", out)
    assert not Path(out).exists()


def test_the_command_says_what_it_made(main: Callable[..., tuple[int, str, str]], run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump(run))
    words = "adopt", tmp_path / "run.yaml", saved(tmp_path, "fine_binary"), tmp_path / "out"
    code, out, err = main(*words, "--network", "fine_binary")
    assert code == 0 and "fine_binary, 354,945 parameters, for features teacher-" in out, err
    code, _, err = main(*words, "--network", "x")
    assert code == 2 and err.startswith("vkd: --network: 'x' is no network") and err.count("\n") == 1


def test_names_that_are_not_the_references_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights of another network: Missing key\(s\)"):
        load_renamed(torch.nn.Linear(2, 2), {"w": torch.zeros(2, 2)}, {})
