"""The dashboard asks only for figures that vkd or Ray exports."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import ray

from vkd import beside, cluster
from vkd.label_report import LabelReport

FOLDER = Path(__file__).parents[2] / "cluster"
METRIC = re.compile(r"\b(?:ray|autoscaler)_\w+(?:\.\+)?")


def queries() -> list[str]:
    board = json.loads((FOLDER / "grafana.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The gauges that a labelling beside training shows, as Prometheus names them."""
    figures: dict[str, float] = {}

    def gauge(name: str, description: str) -> Any:
        return Mock(set=lambda value: figures.update({f"ray_{name}": value}))

    report = LabelReport(pools={"decode": 1, "teacher": 1})
    monkeypatch.setattr(cluster, "Gauge", gauge)
    monkeypatch.setattr(cluster, "GAUGES", {})
    monkeypatch.setattr(beside.ray, "get", lambda _: (report, 0, 0))
    labelling = beside.Beside.__new__(beside.Beside)
    labelling.actor, labelling.report, labelling._looked_s = Mock(), report, 0.0
    labelling._look()
    return set(figures)


def test_vkd_exports_what_is_asked_of_it(exported: set[str]) -> None:
    asked = {name for query in queries() for name in METRIC.findall(query) if name.startswith("ray_vkd_")}
    assert "ray_vkd_labelled" in asked
    for name in asked:
        assert any(re.fullmatch(name, each) for each in exported), name
    for name in exported:
        assert any(re.fullmatch(each, name) for each in asked), f"{name} is exported and not shown"


def test_ray_exports_what_is_asked_of_it() -> None:
    """Its own dashboard asks for the same."""
    panels = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards" / "default_dashboard_panels.py"
    known = set(METRIC.findall(panels.read_text()))
    asked = {name for query in queries() for name in METRIC.findall(query) if not name.startswith("ray_vkd_")}
    assert asked
    assert asked - known == set()


def test_queries_and_panels_are_whole() -> None:
    board = json.loads((FOLDER / "grafana.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for query in queries():
        for opening, closing in ("()", "[]", "{}"):
            assert query.count(opening) == query.count(closing), query
        assert query.count('"') % 2 == 0


def test_prometheus_reads_rays_list_of_nodes() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    files = [path for job in config["scrape_configs"] for source in job.get("file_sd_configs", []) for path in source["files"]]
    assert [Path(path).name for path in files] == ["prom_metrics_service_discovery.json"]
