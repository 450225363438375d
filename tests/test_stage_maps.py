"""Outputs of named parts, in order, and nothing run that is not wanted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vkd.errors import ConfigError
from vkd.stage_maps import frames_as_map, partners, replaced, stage_maps


class Net(nn.Module):
    """Four linear parts, one of them in a part; `unused` never runs and `pair` gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.layer3, self.layer4 = nn.Linear(4, 4), nn.Linear(4, 2)
        self.unused, self.pair = nn.Linear(4, 4), nn.LSTM(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        self.pair(x)
        return x


@pytest.fixture
def network() -> Net:
    torch.manual_seed(0)
    return Net()


def hooks_of(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


@pytest.mark.parametrize("training", [True, False])
def test_outputs_come_in_the_order_of_the_names(network: Net, training: bool) -> None:
    x = torch.randn(3, 4)
    network.train(training)
    maps, final = stage_maps(network, ["layer3", "layer2.0", "layer1"], lambda: network(x))
    first = network.layer1(x)
    torch.testing.assert_close(maps, [network.layer3(network.layer2(first)), network.layer2[0](first), first])
    torch.testing.assert_close(final, network(x))
    assert hooks_of(network) == 0
    assert network.training == training


@pytest.mark.parametrize(("names", "num_stages", "ran"), [(["layer1", "layer2", "layer4"], 2, 2), (["layer3", "layer1", "layer4"], 2, 3)])
def test_nothing_runs_after_the_last_wanted_part(network: Net, names: list[str], num_stages: int, ran: int) -> None:
    seen: list[nn.Module] = []
    layers = [network.layer1, network.layer2, network.layer3, network.layer4]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: seen.append(module))
    x = torch.randn(3, 4)
    maps, final = stage_maps(network, names, lambda: network(x), num_stages)
    assert seen == layers[:ran]
    assert final is None
    assert len(maps) == num_stages
    assert hooks_of(network) == 0
    whole, _ = stage_maps(network, names, lambda: network(x))
    torch.testing.assert_close(maps, whole[:num_stages])


def test_all_stages_give_the_final_output_too(network: Net) -> None:
    x = torch.randn(1, 4)
    _, final = stage_maps(network, ["layer1", "layer2"], lambda: network(x), 2)
    assert torch.equal(final, network(x))
    assert stage_maps(network, [], lambda: network(x))[0] == []


def test_gradients_flow_to_the_parts_before_and_no_others(network: Net) -> None:
    maps, _ = stage_maps(network, ["layer2", "layer4"], lambda: network(torch.randn(3, 4)), 1)
    maps[0].square().sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == {
        f"{name}.{part}" for name in ("layer1", "layer2.0") for part in ("weight", "bias")
    }


def test_autocast_is_left_as_it_was(network: Net) -> None:
    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(torch.randn(3, 4))

    maps, _ = stage_maps(network, ["layer1", "layer4"], run, 1)
    assert maps[0].dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer5", "substages: Net has no part 'layer5' -> did you mean layer"),
        ("Layer2.0", r"no part 'Layer2.0' -> did you mean layer2.0"),
        ("xyz", "did you mean layer1, layer2, layer3, layer4, unused, pair"),
        ("unused", "the part 'unused' does not run"),
        ("pair", "the part 'pair' gives a tuple"),
    ],
)
def test_a_name_that_gives_nothing_is_refused(network: Net, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_maps(network, ["layer1", name], lambda: network(torch.randn(3, 4)))
    assert hooks_of(network) == 0


def test_names_of_later_stages_are_looked_at_too(network: Net) -> None:
    with pytest.raises(ConfigError, match="no part 'layer5'"):
        stage_maps(network, ["layer1", "layer5"], lambda: network(torch.randn(3, 4)), 1)
    with pytest.raises(ValueError, match="num_stages is 0"):
        stage_maps(network, ["layer1"], lambda: network(torch.randn(3, 4)), 0)


def test_hooks_go_when_the_network_raises(network: Net) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        stage_maps(network, ["layer1", "layer2"], lambda: network(torch.randn(3, 5)))
    assert hooks_of(network) == 0


def test_frames_become_a_map() -> None:
    frames = torch.randn(6, 5, 2, 4)
    assert torch.equal(frames_as_map(frames, 2, 3), torch.stack([torch.stack(list(frames[i : i + 3]), dim=1) for i in (0, 3)]))
    assert frames_as_map(frames[:0], 0, 3).shape == (0, 5, 3, 2, 4)
    for wrong in (frames[:5], frames.mean(dim=(2, 3))):
        with pytest.raises(ConfigError, match="is no map over time and space"):
            frames_as_map(wrong, 2, 3)


def test_a_replaced_part_does_not_run(network: Net) -> None:
    x, given = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    ran: list[Tensor] = []
    network.layer2[0].register_forward_pre_hook(lambda module, inputs: ran.append(inputs[0]))
    with replaced(network, {"layer2": given, "layer3": 2 * given}), replaced(network, {"layer3": given}):
        found = network(x)
    torch.testing.assert_close(found, network.layer4(given))
    assert not ran
    found.sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(network(x), network.layer4(network.layer3(network.layer2(network.layer1(x)))))
    assert all("forward" not in vars(module) for module in network.modules())


def test_a_part_is_itself_again_after_an_error(network: Net) -> None:
    with pytest.raises(ConfigError, match="no part 'layer9'"), replaced(network, {"layer9": torch.zeros(1)}):
        pass
    with pytest.raises(RuntimeError), replaced(network, {"layer2": torch.zeros(3, 5)}):
        network(torch.randn(3, 4))
    assert network(torch.randn(3, 4)).shape == (3, 2)


@pytest.mark.parametrize(
    ("num_stages", "num_others", "expected"), [(4, 4, [0, 1, 2, 3]), (2, 4, [1, 3]), (4, 2, [0, 0, 1, 1]), (3, 4, [0, 2, 3]), (1, 1, [0])]
)
def test_partners_lie_as_deep(num_stages: int, num_others: int, expected: list[int]) -> None:
    assert partners(num_stages, num_others) == expected
