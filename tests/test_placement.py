"""Whether nodes hold what a run asks for: first fit, by labels, and nothing taken twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vkd.placement import Need, Node, matching, place, total

GROUPS = ("decode", "teacher")
NODES = st.lists(
    st.builds(
        Node,
        st.fixed_dictionaries({"CPU": st.integers(0, 8), "GPU": st.integers(0, 2)}),
        st.fixed_dictionaries({"vkd-group": st.sampled_from(GROUPS)}),
    ),
    max_size=5,
)
NEEDS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([0.5, 1, 2]), st.sampled_from([0, 1]), st.sampled_from([*GROUPS, None])), max_size=4
).map(
    lambda rows: [
        Need(f"worker {i}", "compute", count, {"CPU": cpus, "GPU": gpus}, {"vkd-group": group} if group else {})
        for i, (count, cpus, gpus, group) in enumerate(rows)
    ]
)


@given(NODES, NEEDS)
def test_what_is_placed_is_taken_once(nodes: list[Node], needs: list[Need]) -> None:
    left, lacking = place(nodes, needs)
    for kind in ("CPU", "GPU"):
        taken = sum((need.count - lacking.get(need.what, 0)) * need.resources[kind] for need in needs)
        assert abs(total(nodes, kind) - total(left, kind) - taken) < 1e-6
    assert all(amount >= -1e-6 for node in left for amount in node.resources.values())


@given(NODES, NEEDS)
def test_what_found_no_place_finds_none_in_what_is_left(nodes: list[Node], needs: list[Need]) -> None:
    left, lacking = place(nodes, needs)
    for need in needs:
        if need.what in lacking:
            there = matching(left, need.labels)
            assert not any(all(node.resources.get(kind, 0) >= amount for kind, amount in need.resources.items()) for node in there)


def test_one_worker_needs_one_node() -> None:
    two_small = [Node({"GPU": 1.0}, {}), Node({"GPU": 1.0}, {})]
    assert place(two_small, [Need("big actor", "compute.teacher", 1, {"GPU": 2}, {})])[1] == {"big actor": 1}


def test_a_need_reads_as_a_sentence() -> None:
    need = Need("teacher actor", "compute.teacher", 2, {"CPU": 1.5, "GPU": 1}, {"vkd-group": "teacher"})
    assert str(need) == "2 teacher actors of 1.5 CPUs and 1 GPU each, on nodes with the label vkd-group=teacher"
