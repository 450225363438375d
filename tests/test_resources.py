"""What a labelling asks of a cluster, by profile and by teacher; the cluster is a table of resources here."""

from __future__ import annotations

import pytest

from vkd import resources
from vkd.compute import Compute
from vkd.errors import ConfigError
from vkd.placement import Node


def asked(
    monkeypatch: pytest.MonkeyPatch, have: dict[str, float], compute: dict[str, object], *aliases: str, beside: bool = False
) -> resources.Resources:
    monkeypatch.setattr(resources, "cluster_nodes", lambda: [Node(have, {})])
    monkeypatch.setattr(resources.autoscaler, "is_on", lambda: False)
    return resources.requested(Compute.model_validate(compute), aliases or ("teacher",), beside)


def total_cpus(found: resources.Resources) -> float:
    return found.decode_workers * found.decode_cpus + sum(pool.actors * pool.cpus for pool in found.pools.values())


@pytest.mark.parametrize("aliases", [("a",), ("a", "b", "c")])
@pytest.mark.parametrize("cores", [1, 2, 16])
@pytest.mark.parametrize("beside", [False, True])
def test_a_laptop_is_shared_below_what_it_has(monkeypatch: pytest.MonkeyPatch, aliases: tuple[str, ...], cores: int, beside: bool) -> None:
    compute = {"student": {"workers": 2, "cpus": 0.2}}
    found = asked(monkeypatch, {"CPU": cores}, compute, *aliases, beside=beside)
    assert total_cpus(found) == pytest.approx(0.95 * (cores - (0.4 if beside else 0)))
    assert all(pool.cpus != found.decode_cpus for pool in found.pools.values())  # or Ray would fuse them


def test_each_teacher_may_have_its_own_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = {"teacher": {"actors": 3}, "teachers": {"big": {"actors": 1, "gpus": 4, "cpus": 2}}}
    found = asked(monkeypatch, {"CPU": 64, "GPU": 8}, compute, "big", "small")
    assert found.pools == {"big": resources.Pool(1, 2, 4, 2, {}), "small": resources.Pool(3, 1.5, 1.0, 1, {})}
    assert found.decode_limit is None and found.num_workers == {"decode": 64, "big": 1, "small": 3}


def test_gpus_of_students_are_not_given_to_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    student = {"student": {"workers": [1, 6], "gpus": 1}}
    assert asked(monkeypatch, {"CPU": 64, "GPU": 8}, student, beside=True).pools["teacher"].actors == 2
    assert asked(monkeypatch, {"CPU": 64, "GPU": 8}, student).pools["teacher"].actors == 8


@pytest.mark.parametrize(
    ("compute", "where", "what"),
    [
        ({"teachers": {"nobody": {}}}, "compute.teachers.nobody", "no teacher of this name"),
        ({"teacher": {"actors": 9, "cpus": 1}}, "compute.teacher", "9 teacher actors of 1 CPU each; 7 of them find no place"),
        ({"teacher": {"gpus": 1}}, "compute.teacher", "find no place: the cluster has 1 such node, with 2 CPUs and 0 GPUs in all"),
        ({"student": {"workers": 2}}, "compute.student", "2 student workers take all CPUs"),
    ],
)
def test_what_cannot_be_is_refused_with_the_key(monkeypatch: pytest.MonkeyPatch, compute: dict[str, object], where: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        asked(monkeypatch, {"CPU": 2}, compute, beside=True)
    assert caught.value.where == where
