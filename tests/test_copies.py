"""Which copies a source gets: the plan is pure, truthful and the same everywhere."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd.copies import KINDS, PARTIAL, Copies, Crop, plan, splits
from vkd.errors import ConfigError

SOURCES = [f"natural/{i}.mp4" for i in range(56)]


def how_of(**keys: Any) -> Copies:
    return Copies.model_validate({"out": "/nowhere"} | keys)


def test_a_plan_is_the_same_each_time_and_grows() -> None:
    lengths = {source: 20 + i for i, source in enumerate(SOURCES)}
    split_of = splits(SOURCES, how_of(split=[30, 8, 18]))
    planned = plan(how_of(), lengths, split_of)
    assert planned == plan(how_of(), dict(reversed(lengths.items())), split_of)
    assert Counter(copy.kind == PARTIAL for copy in planned) == {True: 56 * 6, False: 56 * 6}
    assert {copy.kind for copy in planned} == {*KINDS, PARTIAL}
    assert set(plan(how_of(per_video=5), lengths, split_of)) < set(planned)
    assert {c.shown for c in planned if c.kind == PARTIAL}.isdisjoint(c.shown for c in plan(how_of(seed=1), lengths, split_of))
    names = {copy.name(how_of()) for copy in planned}
    assert len(names) == len(planned)
    assert names.isdisjoint(copy.name(how_of(fps=4)) for copy in planned)


def test_the_names_of_copies_stay() -> None:
    """A change of these means that all copies are rendered anew: raise EDITION."""
    copies = plan(how_of(per_video=3), {"a/b c.mp4": 8, "d.mp4": 40}, dict.fromkeys(["a/b c.mp4", "d.mp4"], "train"))
    assert [copy.name(how_of()) for copy in copies[:3]] == [
        "b_c-2cd8bf9d-00-reversal-5628ac8e.mp4",
        "b_c-2cd8bf9d-01-partial-a3e1f03d.mp4",
        "b_c-2cd8bf9d-02-crop-e38ef5d2.mp4",
    ]


def test_sources_are_split_and_hosts_are_of_the_same_split() -> None:
    split_of = splits(SOURCES, how_of(split=[30, 8, 18]))
    assert Counter(split_of.values()) == {"train": 30, "val": 8, "test": 18}
    assert split_of == splits(SOURCES[::-1], how_of(split=[30, 8, 18])) != splits(SOURCES, how_of(split=[30, 8, 18], seed=1))
    planned = plan(how_of(), dict.fromkeys(SOURCES, 40), split_of)
    hosted = [(copy.source, copy.host) for copy in planned if copy.host is not None]
    assert len(hosted) == 56 * 6
    assert all(source != host and split_of[source] == split_of[host] for source, host in hosted)
    with pytest.raises(ConfigError, match=r"are 55 sources, data.source has 56"):
        splits(SOURCES, how_of(split=[30, 8, 17]))
    assert set(splits(SOURCES, how_of()).values()) == {"train"}


def test_without_a_host_there_is_no_partial_copy() -> None:
    planned = plan(how_of(), {"a": 40, "b": 40}, {"a": "train", "b": "val"})
    assert len(planned) == 12
    assert not any(copy.kind == PARTIAL for copy in planned)


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 1000))
def test_what_a_copy_shows(here: int, there: int, seed: int) -> None:
    how = how_of(seed=seed, max_length_s=25)
    for copy in plan(how, {"a": here, "b": there}, {"a": "train", "b": "train"}):
        num_frames, own = (here, there) if copy.source == "a" else (there, here), [n for n in copy.shown if n >= 0]
        assert own, "every copy shows something of its source"
        assert all(~num_frames[1] < n < num_frames[0] for n in copy.shown)
        if copy.pasted is not None:
            part = copy.pasted
            assert len(copy.shown) <= how.max_frames
            assert 0.1 - 1e-9 <= part.num_frames / len(copy.shown) <= 0.4 + 1e-9
            assert own == list(range(part.source_first, part.source_first + part.num_frames))
            assert list(copy.shown[part.first : part.first + part.num_frames]) == own
            assert 0 < part.first < part.first + part.num_frames < len(copy.shown)
        elif copy.kind == "reversal":
            assert own == sorted(range(num_frames[0]), reverse=True)
        elif copy.kind == "cuts" and num_frames[0] > 1:
            assert own == sorted(set(own))
            assert len(own) < num_frames[0]
        elif copy.kind == "speed":
            assert own == sorted(own)
            assert num_frames[0] / 2 - 1 <= len(own) <= 2 * num_frames[0] + 1
        if isinstance(copy.look, Crop):
            assert 0.6 <= copy.look.side <= (0.95 if copy.pasted else 0.9)
