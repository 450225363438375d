"""The dashboard asks only for figures that vkd or Ray exports."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import ray

from vkd import beside, cluster, label_report, training
from vkd.label_report import LabelReport, Rates

FOLDER = Path(__file__).parents[2] / "cluster"
METRIC = re.compile(r"\b(?:ray|autoscaler)_\w+(?:\.\+)?")


def queries() -> list[str]:
    board = json.loads((FOLDER / "grafana.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def calls(module: ModuleType, name: str) -> list[ast.Call]:
    """Where a module calls a function of this name."""
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    return [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The gauges of labelling, of what it hands over, and of training, as Prometheus names them."""
    figures: dict[str, float] = {}

    def gauge(name: str, description: str) -> Any:
        return Mock(set=lambda value: figures.update({f"ray_{name}": value}))

    monkeypatch.setattr(cluster, "Gauge", gauge)
    monkeypatch.setattr(cluster, "GAUGES", {})
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(label_report, "LOOK_S", 0.0)
    cluster.export_metrics(Rates().of(LabelReport(pools={"decode": 1, "teacher": 1})))
    exports = [call.args[0] for module in (beside, training) for call in calls(module, "export_metrics")]
    names = {key.value for each in exports if isinstance(each, ast.Dict) for key in each.keys if isinstance(key, ast.Constant)}
    return set(figures) | {f"ray_vkd_{name}" for name in names}


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
