"""The rules as they stand: valid, each alert tried and explained, and of metrics that the service
has.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.queries import (
    OTHERS,
    RULES,
    RUNBOOKS,
    SETTINGS,
    metrics_in,
    recorded,
    rules,
    runbook_queries,
    served,
)
from tests.requirements import PROMTOOL, prometheus

ALERTS = [rule["alert"] for rule in rules() if "alert" in rule]
TRIED = Path("tests/k8s/alerts.yaml")


@prometheus
def test_promtool_takes_the_rules_as_they_stand() -> None:
    done = subprocess.run(
        [PROMTOOL, "check", "rules", "--lint=all", *map(str, RULES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@prometheus
def test_every_alert_fires_when_it_should_and_only_then() -> None:
    done = subprocess.run(
        [PROMTOOL, "test", "rules", str(TRIED)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_is_tried_firing_and_silent(alert: str) -> None:
    tried = [
        case
        for test in yaml.safe_load(TRIED.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == alert
    ]
    assert any(case["exp_alerts"] for case in tried), f"{TRIED} never sees {alert} fire"
    assert any(not case["exp_alerts"] for case in tried), f"{TRIED} never sees {alert} silent"


def test_rules_ask_only_for_what_somebody_tells() -> None:
    known = served() | recorded() | SETTINGS | OTHERS
    for rule in rules():
        unknown = metrics_in(rule["expr"]) - known
        assert not unknown, (
            f"{rule.get('alert') or rule['record']} asks for {', '.join(sorted(unknown))}, which"
            " nobody tells"
        )


def test_a_recorded_series_is_by_namespace_release_and_arm() -> None:
    """Two releases in one Prometheus must not be added up."""
    for rule in rules():
        for labels in re.findall(r"\bby \(([^)]*)\)", rule["expr"]):
            grouped = set(labels.split(", "))
            assert {"namespace", "release", "arm"} <= grouped or grouped == {
                "namespace",
                "pod",
            }, f"{rule.get('alert') or rule['record']} groups by {labels}"


@pytest.mark.parametrize("rule", [rule for rule in rules() if "alert" in rule], ids=ALERTS)
def test_an_alert_says_what_is_wrong_how_bad_it_is_and_where_to_read_on(
    rule: dict[str, dict[str, str]],
) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    anchors = {title.lower() for title in re.findall(r"^## (\w+)$", Path(page).read_text(), re.M)}
    assert anchor in anchors, f"{page} has no entry for it"


def test_the_runbooks_hold_an_entry_for_every_alert_and_no_other() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOKS.read_text(), re.M) == ALERTS


def test_a_runbook_says_what_it_means_how_to_look_and_what_to_do() -> None:
    for entry in re.split(r"^## ", RUNBOOKS.read_text(), flags=re.M)[1:]:
        assert re.findall(r"^\*\*([\w ]+)\.\*\*", entry, re.M) == [
            "Meaning",
            "Diagnosis",
            "Remedy",
        ], entry.splitlines()[0]


def test_the_runbooks_ask_the_service_only_for_what_it_tells() -> None:
    for query in runbook_queries():
        ours = {name for name in metrics_in(query) if name.startswith("drbert")}
        assert ours <= served() | recorded() | SETTINGS, query
