"""Spans, timestamps, views, example ids and splits, as properties."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from vkd import schema
from vkd.clips import ClipPlan, Sampling, SplitPlan, View, ViewPolicy, assign_splits, plan_examples, uniform_numbers
from vkd.errors import ManifestError

durations_s = st.floats(0.04, 20_000)
lengths_s = st.floats(0.5, 60)
keys = st.text(max_size=20)
plans = st.one_of(
    st.just(ClipPlan()),
    st.builds(lambda n: ClipPlan(plan="count", count=n), st.integers(1, 9)),
    st.builds(lambda a, b: ClipPlan(plan="windows", length_s=a, stride_s=b), lengths_s, st.one_of(st.none(), st.floats(2, 60))),
)


@given(durations_s, plans)
def test_spans_ascend_inside_the_video(duration_s: float, plan: ClipPlan) -> None:
    spans = plan.spans_s(duration_s)
    assert spans[0][0] == 0
    assert all(0 <= start_s < end_s <= duration_s for start_s, end_s in spans if end_s is not None)
    assert len({start_s for start_s, _ in spans}) == len(spans)
    assert spans == sorted(spans)


@given(durations_s, st.integers(1, 9))
def test_count_cuts_all_of_the_video_in_equal_parts(duration_s: float, count: int) -> None:
    spans = ClipPlan(plan="count", count=count).spans_s(duration_s)
    assert len(spans) == count
    assert spans[-1][1] == duration_s
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert [b - a for a, b in spans if b is not None] == pytest.approx([duration_s / count] * count)


@given(durations_s, lengths_s, st.floats(2, 60))
def test_windows_leave_out_less_than_one_stride_at_the_end(duration_s: float, length_s: float, stride_s: float) -> None:
    spans = ClipPlan(plan="windows", length_s=length_s, stride_s=stride_s).spans_s(duration_s)
    last_end_s = spans[-1][1]
    assert last_end_s is not None
    assert duration_s - last_end_s < stride_s + 1e-6
    assert all(b is not None and b - a == pytest.approx(min(length_s, duration_s)) for a, b in spans)
    assert [a for a, _ in spans] == pytest.approx([i * stride_s for i in range(len(spans))])


def test_windows_at_exact_multiples() -> None:
    plan = ClipPlan(plan="windows", length_s=0.1)
    assert len(plan.spans_s(0.3)) == 3  # 0.3 - 0.1 is a little less than 0.2 in floats
    assert ClipPlan(plan="windows", length_s=2, stride_s=1).spans_s(4.0) == [(0, 2), (1, 3), (2, 4)]
    assert ClipPlan(plan="windows", length_s=5).spans_s(3.0) == [(0, 3)]


def test_only_whole_needs_no_duration() -> None:
    assert ClipPlan().spans_s(None) == ClipPlan(plan="count", count=1).spans_s(None) == [(0.0, None)]
    for plan in (ClipPlan(plan="count", count=2), ClipPlan(plan="windows", length_s=1)):
        with pytest.raises(ManifestError, match="duration_s"):
            plan.spans_s(None)


@pytest.mark.parametrize("options", [{"plan": "windows"}, {"plan": "count"}, {"plan": "windows", "length_s": 0}, {"lenght_s": 1}])
def test_incomplete_plans_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ClipPlan(**options)


samplings = st.one_of(
    st.builds(lambda n, mode: Sampling(num_frames=n, mode=mode), st.integers(1, 64), st.sampled_from(["uniform", "segment_random"])),
    st.builds(lambda n, fps: Sampling(num_frames=n, mode="fps", fps=fps), st.integers(1, 64), st.floats(0.1, 60)),
)


@given(samplings, st.floats(0, 10_000), st.floats(0.01, 600), keys)
def test_timestamps_ascend_in_the_half_open_span(sampling: Sampling, start_s: float, span_s: float, key: str) -> None:
    end_s = start_s + span_s
    times_s = sampling.timestamps_s(start_s, end_s, key)
    assert times_s.shape == (sampling.num_frames,)
    assert np.all(np.diff(times_s) >= 0)
    assert start_s <= times_s[0]
    assert times_s[-1] < end_s
    np.testing.assert_array_equal(times_s, sampling.timestamps_s(start_s, end_s, key))


@given(samplings, st.floats(0, 100))
def test_an_empty_span_repeats_its_start(sampling: Sampling, start_s: float) -> None:
    assert set(sampling.timestamps_s(start_s, start_s, "key")) == {start_s}


@given(st.integers(1, 32), st.floats(0, 1000), st.floats(0.1, 600), keys)
def test_segments(num_frames: int, start_s: float, span_s: float, key: str) -> None:
    edges_s = start_s + np.arange(num_frames + 1) / num_frames * span_s
    centres_s = Sampling(num_frames=num_frames).timestamps_s(start_s, start_s + span_s, key)
    random_s = Sampling(num_frames=num_frames, mode="segment_random").timestamps_s(start_s, start_s + span_s, key)
    np.testing.assert_allclose(centres_s, (edges_s[1:] + edges_s[:-1]) / 2)
    assert np.all((edges_s[:-1] - 1e-9 <= random_s) & (random_s <= edges_s[1:] + 1e-9))


def test_random_timestamps_are_the_keys() -> None:
    sampling = Sampling(mode="segment_random")
    a, b = (sampling.timestamps_s(0, 10, key) for key in ("a", "b"))
    assert not np.array_equal(a, b)
    np.testing.assert_allclose(a[:3], [0.179212, 2.470365, 2.845914], atol=1e-6)  # the same on every machine and in every version


def test_fps_steps_evenly_and_holds_the_last_moment() -> None:
    times_s = Sampling(num_frames=5, mode="fps", fps=2).timestamps_s(1.0, 2.2, "")
    np.testing.assert_allclose(times_s, [1, 1.5, 2, 2.2, 2.2])
    for options in ({"mode": "fps"}, {"fps": 2.0}):
        with pytest.raises(ValidationError, match="fps is given exactly when"):
            Sampling(**options)  # type: ignore[arg-type]


@given(keys, st.integers(0, 5))
def test_uniform_numbers_are_a_prefix_stable_function_of_the_key(key: str, count: int) -> None:
    numbers = uniform_numbers(key, count + 1)
    assert np.all((numbers >= 0) & (numbers < 1))
    np.testing.assert_array_equal(numbers[:count], uniform_numbers(key, count))


policies = st.builds(
    lambda region, scale, flip, seed: ViewPolicy(region=region, min_scale=scale, flip=flip, seed=seed),
    st.sampled_from(["square", "frame"]),
    st.floats(0.01, 1),
    st.booleans(),
    st.integers(0, 9),
)


@given(policies, keys, st.integers(1, 20))
@example(ViewPolicy(min_scale=1), "", 1)
def test_views_lie_inside_and_keep_their_scale(policy: ViewPolicy, example_id: str, index: int) -> None:
    view = policy.view(example_id, index)
    left, top, right, bottom = view.crop
    assert 0 <= left < right <= 1
    assert 0 <= top < bottom <= 1
    assert right - left == pytest.approx(bottom - top)
    assert policy.min_scale - 1e-9 <= (right - left) * (bottom - top) <= 1 + 1e-9
    assert view == policy.view(example_id, index)
    assert policy.flip or not view.flip


@given(policies, keys)
def test_view_zero_is_the_whole_region(policy: ViewPolicy, example_id: str) -> None:
    assert policy.view(example_id, 0) == View(policy.region, (0, 0, 1, 1), False, policy.decoding)


def test_views_differ_by_index_example_and_seed() -> None:
    policy = ViewPolicy()
    views = [policy.view("a", 1), policy.view("a", 2), policy.view("b", 1), ViewPolicy(seed=1).view("a", 1)]
    assert len({view.crop for view in views}) == 4
    flips = [policy.view(str(i), 1).flip for i in range(400)]
    assert 160 < sum(flips) < 240


@given(policies, keys, st.integers(0, 5), st.integers(16, 4000), st.integers(16, 4000))
def test_boxes_lie_in_the_frame(policy: ViewPolicy, example_id: str, index: int, width_px: int, height_px: int) -> None:
    left, top, right, bottom = policy.view(example_id, index).box_px(width_px, height_px)
    assert -1e-6 <= left < right <= width_px + 1e-6
    assert -1e-6 <= top < bottom <= height_px + 1e-6
    if policy.region == "square":
        assert right - left == pytest.approx(bottom - top)


def test_box_of_known_crops() -> None:
    assert View("square").box_px(1280, 720) == (280, 0, 1000, 720)
    assert View("square").box_px(480, 640) == (0, 80, 480, 560)
    assert View("frame").box_px(1280, 720) == (0, 0, 1280, 720)
    assert View("square", (0.5, 0, 1, 0.5)).box_px(1280, 720) == (640, 0, 1000, 360)
    assert View("frame", (0.5, 0, 1, 0.5)).box_px(1280, 720) == (640, 0, 1280, 360)


def videos(durations: list[float], first: int = 0) -> pa.Table:
    ids = [f"v{first + i}" for i in range(len(durations))]
    return pa.table(
        {schema.VIDEO_ID: ids, schema.DURATION_S: pa.array(durations, pa.float64()), schema.LABEL: [f"label of {i}" for i in ids]}
    )


@given(st.lists(st.floats(0.04, 600), max_size=6), plans)
def test_examples_are_unique_and_keep_the_order_and_columns_of_videos(durations: list[float], plan: ClipPlan) -> None:
    table = plan_examples(videos(durations), plan)
    ids = table[schema.EXAMPLE_ID].to_pylist()
    assert len(set(ids)) == len(ids) == sum(len(plan.spans_s(d)) for d in durations)
    owners = table[schema.VIDEO_ID].to_pylist()
    assert owners == sorted(owners)
    assert table[schema.LABEL].to_pylist() == [f"label of {i}" for i in owners]
    assert table.column_names[:3] == [schema.EXAMPLE_ID, schema.START_S, schema.END_S]


@given(st.lists(st.floats(1, 100), min_size=2, max_size=6), plans, st.data())
def test_ids_do_not_depend_on_the_other_rows_of_the_shard(durations: list[float], plan: ClipPlan, data: st.DataObject) -> None:
    together = plan_examples(videos(durations), plan)
    cut = data.draw(st.integers(1, len(durations) - 1))
    parts = [plan_examples(videos(durations[:cut]), plan), plan_examples(videos(durations[cut:], first=cut), plan)]
    assert together == pa.concat_tables(parts).combine_chunks()


def test_moments_keep_their_spans() -> None:
    table = pa.table({schema.VIDEO_ID: ["a", "a", "b"], schema.START_S: [0, 2, 0], schema.END_S: [2, 4, 2]})
    planned = plan_examples(table, ClipPlan(plan="count", count=3))
    assert planned[schema.START_S].to_pylist() == [0.0, 2.0, 0.0]
    assert len(set(planned[schema.EXAMPLE_ID].to_pylist())) == 3
    as_floats = table.set_column(1, schema.START_S, pa.array([0.0, 2.0, 0.0])).set_column(2, schema.END_S, pa.array([2.0, 4.0, 2.0]))
    assert plan_examples(as_floats, ClipPlan()) == planned


def test_ids_are_golden() -> None:
    ids = plan_examples(videos([3.0, 4.5]), ClipPlan(plan="count", count=2))[schema.EXAMPLE_ID].to_pylist()
    assert ids == [
        "ccd25796e4bdc04a235c1be9",
        "52e427423d4ea2128a8b94c7",
        "b799f96d53f6f221d43a0798",
        "3c50219899a9da3cd6b7798f",
    ]  # a change here orphans every label that was ever made


@given(st.floats(0.04, 600), plans, st.floats(0.05, 0.95), st.floats(0, 30))
def test_time_split_keeps_the_gap(duration_s: float, plan: ClipPlan, holdout: float, gap_s: float) -> None:
    examples = plan_examples(videos([duration_s, duration_s]), plan)
    sides = assign_splits(examples, SplitPlan(by="time", holdout=holdout, gap_s=gap_s))
    assert sides[: len(sides) // 2] == sides[len(sides) // 2 :]
    spans = list(zip(sides, examples[schema.START_S].to_pylist(), examples[schema.END_S].to_pylist(), strict=True))
    trained_s = max((end_s for side, _, end_s in spans if side == schema.TRAIN), default=-np.inf)
    held_out_s = min((start_s for side, start_s, _ in spans if side == schema.VAL), default=np.inf)
    assert trained_s + gap_s <= held_out_s + 1e-6
    assert set(sides) <= {schema.TRAIN, schema.VAL, schema.GAP}


def test_time_split_of_known_windows() -> None:
    examples = plan_examples(videos([8.0]), ClipPlan(plan="windows", length_s=1))
    assert assign_splits(examples, SplitPlan(by="time", gap_s=1.0)) == ["train"] * 5 + ["gap"] + ["val"] * 2
    assert assign_splits(examples, SplitPlan(by="time")) == ["train"] * 6 + ["val"] * 2
    with pytest.raises(ManifestError, match="duration_s"):
        assign_splits(
            plan_examples(videos([8.0]).set_column(1, schema.DURATION_S, pa.array([None], pa.float64())), ClipPlan()), SplitPlan(by="time")
        )


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), st.integers(0, 99), st.floats(0.05, 0.95))
def test_a_group_is_on_one_side(groups: list[str], seed: int, holdout: float) -> None:
    plan = SplitPlan(by="group", group=schema.GROUP, seed=seed, holdout=holdout)
    sides = assign_splits(pa.table({schema.GROUP: groups}), plan)
    assert len(set(zip(groups, sides, strict=True))) == len(set(groups))
    assert sides == [assign_splits(pa.table({schema.GROUP: [group]}), plan)[0] for group in groups]


def test_group_split_holds_out_about_the_share() -> None:
    table = pa.table({schema.GROUP: [str(i) for i in range(2000)]})
    shares = [assign_splits(table, SplitPlan(by="group", group=schema.GROUP, seed=s)).count(schema.VAL) / 2000 for s in (0, 1)]
    assert shares == pytest.approx([0.25, 0.25], abs=0.04)


def test_column_split_and_none() -> None:
    table = pa.table({schema.SPLIT: ["val", None, "train", "gap"]})
    assert assign_splits(table, SplitPlan(by="column")) == ["val", "train", "train", "gap"]
    assert assign_splits(table, SplitPlan()) == ["train"] * 4
    for plan in (SplitPlan(by="column"), SplitPlan(by="group", group="person")):
        with pytest.raises(ManifestError, match="needs the column"):
            assign_splits(pa.table({"x": [1]}), plan)
