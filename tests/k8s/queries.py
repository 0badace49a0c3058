"""
The PromQL queries of the rules, the dashboards and the runbooks, and the series that they use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from service.telemetry.metrics import Metrics

CHART = Path("k8s/chart")
RULES = sorted(CHART.glob("rules/*.yaml"))
DASHBOARDS = sorted(CHART.glob("dashboards/*.json"))
RUNBOOKS = Path("k8s/runbooks.md")

SETTINGS = {
    "drbert:setting:arm",
    "drbert:setting:margin",
    "drbert:setting:error_budget",
    "drbert:setting:max_waiting",
}
"""Series of the rule group `settings`, which the chart renders from its values."""
FOREIGN = {
    "up",
    "kube_pod_container_status_restarts_total",
    "kube_pod_init_container_status_restarts_total",
    "container_cpu_cfs_periods_total",
    "container_cpu_cfs_throttled_periods_total",
}
"""Series of Prometheus itself, of kube-state-metrics and of the kubelet."""


def rules() -> Iterator[dict[str, Any]]:
    """Yield each recording rule and alert."""
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def recorded_series() -> set[str]:
    """Return the names of the series that the rules record."""
    return {rule["record"] for rule in rules() if "record" in rule}


def panels() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield each panel, after the path of its dashboard."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            yield path, panel


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Yield each query of the dashboards, after the name of its panel."""
    for path, panel in panels():
        for target in panel.get("targets", []):
            yield f"{path.stem}: {panel['title']} {target['refId']}", target["expr"]


def runbook_queries() -> list[str]:
    """Return the queries of the runbooks."""
    return re.findall(r"^```promql\n(.*?)\n```", RUNBOOKS.read_text(), re.M | re.S)


def fill_in(query: str, variables: Mapping[str, str]) -> str:
    """Return a dashboard's query with the values of its variables."""
    return re.sub(r"\$(\w+)", lambda match: variables[match[1]], query)


def metrics_in(query: str) -> set[str]:
    """Return the names of the series that a query reads."""
    bare = re.sub(r'"[^"]*"|\'[^\']*\'', '""', query)
    return set(re.findall(r"\b(?:drbert[\w:]*|kube_\w+|container_\w+|up\b)", bare))


def service_series() -> set[str]:
    """Return the names of the series that the service has on /metrics."""
    registry = CollectorRegistry()
    Metrics(registry)
    endings = {
        "counter": ["_total"],
        "histogram": ["_bucket", "_sum", "_count"],
        "info": ["_info"],
        "gauge": [""],
    }
    return {
        f"{family.name}{ending}" for family in registry.collect() for ending in endings[family.type]
    }
