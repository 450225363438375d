"""`vkd index` and `vkd search`, told wrong things."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Main = Callable[..., tuple[int, str, str]]


def test_a_folder_without_an_index_is_told(main: Main, tmp_path: Path) -> None:
    code, _, err = main("search", tmp_path, "q.mp4")
    assert code == 2 and f"vkd: {tmp_path}: no index here -> vkd index RUN {tmp_path}" in err


def test_a_budget_that_is_no_share_is_told(main: Main, tmp_path: Path) -> None:
    code, _, err = main("search", tmp_path, "q.mp4", "--budget", "200%")
    assert code == 2 and "--budget '200%' is no share" in err
