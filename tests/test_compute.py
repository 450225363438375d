"""How many workers a group has: a number or a range, checked."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from vkd.compute import StudentGroup


@pytest.mark.parametrize(("workers", "bounds"), [(0, (0, 0)), (3, (3, 3)), ([1, 8], (1, 8))])
def test_a_group_is_a_number_or_a_range(workers: object, bounds: tuple[int, int]) -> None:
    group = StudentGroup.model_validate({"workers": workers})
    assert (group.min_workers, group.max_workers) == bounds
    assert StudentGroup.model_validate(group.model_dump(mode="json")) == group


@pytest.mark.parametrize("workers", [-1, [0, 2], [3, 2], [1, 2, 3], "two"])
def test_what_is_no_group_is_refused(workers: object) -> None:
    with pytest.raises(ValidationError):
        StudentGroup.model_validate({"workers": workers})
