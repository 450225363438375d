"""Lines that a person reads."""

from __future__ import annotations

import pytest

from vkd.console import Screen
from vkd.label_report import LabelReport

CHUNK = {"labelled": 4, "elsewhere": 0, "rejected": {}, "decode_s": 1.0, "teach_s": {"teacher": 1.0}, "busy_s": {}, "fidelity": {}}


def test_what_labels_look_like_is_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    report = LabelReport()
    for norm, entropy_nats, duplicates in ((3.0, 1.0, 0.0), (5.0, 2.0, 0.5)):
        told = {"clips": 4.0, "norm_mean": norm, "norm_std": 0.0, "distinct": 4.0, "duplicates": duplicates}
        report.add(CHUNK | {"statistics": {"teacher.logits": told | {"entropy_nats": entropy_nats}, "teacher.embedding": told}})
    Screen().statistics(report)
    assert capsys.readouterr().out.splitlines() == [
        "  teacher.logits: norm 4 ± 1, entropy 1.5 nats, 25.0% duplicates",
        "  teacher.embedding: norm 4 ± 1, 25.0% duplicates",
    ]
