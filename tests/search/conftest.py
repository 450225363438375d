"""Few pairs to calibrate on: shapes are checked at every call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vkd.search import calibration


@pytest.fixture(scope="session", autouse=True)
def few_pairs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "NUM_PAIRS", 30)
        yield
