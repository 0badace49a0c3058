"""
The queries that operators live by: of the rules, of the dashboards and, where the chart can be
rendered, of its autoscalers.
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

# What the settings group is to record for one release; the chart renders it from its values.
SETTINGS = {
    "drbert:setting:arm",
    "drbert:setting:margin",
    "drbert:setting:error_budget",
    "drbert:setting:max_waiting",
}
# Told by others: Prometheus itself, kube-state-metrics, the kubelet.
OTHERS = {
    "up",
    "kube_pod_container_status_restarts_total",
    "kube_pod_init_container_status_restarts_total",
    "container_cpu_cfs_periods_total",
    "container_cpu_cfs_throttled_periods_total",
}


def rules() -> Iterator[dict[str, Any]]:
    """Every recording rule and alert."""
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def panels() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            yield path, panel


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Each query of the dashboards, after the name of its panel."""
    for path, panel in panels():
        for target in panel.get("targets", []):
            yield f"{path.stem}: {panel['title']} {target['refId']}", target["expr"]


def runbook_queries() -> list[str]:
    """What whoever looks is told to ask."""
    return re.findall(r"^```promql\n(.*?)\n```", RUNBOOKS.read_text(), re.M | re.S)


def filled_in(query: str, variables: Mapping[str, str]) -> str:
    """A dashboard's query with its variables' values in place."""
    return re.sub(r"\$(\w+)", lambda found: variables[found[1]], query)


def metrics_in(query: str) -> set[str]:
    """The names of series that a query asks for: ours, recorded ones and others'."""
    bare = re.sub(r'"[^"]*"|\'[^\']*\'', '""', query)
    return set(re.findall(r"\b(?:drbert[\w:]*|kube_\w+|container_\w+|up\b)", bare))


def served() -> set[str]:
    """The names of series that the service has on /metrics."""
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
