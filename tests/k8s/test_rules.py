"""The rules are valid, read series that exist, and each alert is tested and explained."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.helm import render
from tests.k8s.profiles import of_kind
from tests.k8s.queries import (
    FOREIGN,
    RULES,
    RUNBOOKS,
    SETTINGS,
    metrics_in,
    recorded_series,
    rules,
    runbook_queries,
    service_series,
)
from tests.requirements import PROMTOOL, prometheus

ALERTS = [rule["alert"] for rule in rules() if "alert" in rule]
ALERT_TESTS = Path("tests/k8s/alerts.yaml")


@prometheus
def test_promtool_accepts_the_rules() -> None:
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
        [PROMTOOL, "test", "rules", str(ALERT_TESTS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@prometheus
def test_the_rules_of_two_releases_in_one_prometheus_record_and_alert_once(tmp_path: Path) -> None:
    releases = ("team-a", "team-b")
    for release in releases:
        documents = render({"monitoring": {"rules": {"enabled": True}}}, name=release)
        [document] = of_kind(documents, "PrometheusRule")
        (tmp_path / f"{release}.yaml").write_text(yaml.safe_dump(document["spec"]))
    requests = "drbert_requests_total{{{}}}"
    rate = 'drbert:requests:rate5m{{namespace="prod",release="{}",arm="bert"}}'
    alerts = 'count by (release) (ALERTS{alertname="DrbertNoReadyPod",arm="bert"})'
    labels = 'namespace="prod",release="{}",arm="bert",pod="{}-bert-1",model="bert",code="200"'
    case = {
        "rule_files": [f"{release}.yaml" for release in releases],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": requests.format(labels.format(name, name)), "values": "0+60x20"}
                    for name in releases
                ],
                "promql_expr_test": [
                    {
                        "expr": "drbert:requests:rate5m",
                        "eval_time": "10m",
                        "exp_samples": [
                            {
                                "labels": rate.format(name),
                                "value": 1,
                            }
                            for name in releases
                        ],
                    },
                    {
                        "expr": alerts,
                        "eval_time": "10m",
                        "exp_samples": [
                            {"labels": f'{{release="{name}"}}', "value": 1} for name in releases
                        ],
                    },
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(case))
    done = subprocess.run(
        [PROMTOOL, "test", "rules", str(tmp_path / "test.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_is_tested_firing_and_silent(alert: str) -> None:
    cases = []
    for test in yaml.safe_load(ALERT_TESTS.read_text())["tests"]:
        cases += [case for case in test["alert_rule_test"] if case["alertname"] == alert]
    assert any(case["exp_alerts"] for case in cases), (
        f"{ALERT_TESTS} has no case where {alert} fires"
    )
    assert any(not case["exp_alerts"] for case in cases), (
        f"{ALERT_TESTS} has no case where {alert} is silent"
    )


def test_rules_read_only_series_that_exist() -> None:
    known = service_series() | recorded_series() | SETTINGS | FOREIGN
    for rule in rules():
        unknown = metrics_in(rule["expr"]) - known
        assert not unknown, (
            f"{rule.get('alert') or rule['record']} reads {', '.join(sorted(unknown))}, which"
            " does not exist"
        )


def test_a_recorded_series_is_grouped_by_namespace_release_and_arm() -> None:
    """Two releases in one Prometheus must not be added up."""
    for rule in rules():
        for labels in re.findall(r"\bby \(([^)]*)\)", rule["expr"]):
            grouped = set(labels.split(", "))
            assert {"namespace", "release", "arm"} <= grouped or grouped == {
                "namespace",
                "pod",
            }, f"{rule.get('alert') or rule['record']} groups by {labels}"


@pytest.mark.parametrize("rule", [rule for rule in rules() if "alert" in rule], ids=ALERTS)
def test_an_alert_has_a_severity_a_description_and_a_runbook(
    rule: dict[str, dict[str, str]],
) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    anchors = {title.lower() for title in re.findall(r"^## (\w+)$", Path(page).read_text(), re.M)}
    assert anchor in anchors, f"{page} has no entry for it"


def test_the_runbooks_have_an_entry_for_each_alert_and_no_other() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOKS.read_text(), re.M) == ALERTS


def test_a_runbook_has_a_meaning_a_diagnosis_and_a_remedy() -> None:
    for entry in re.split(r"^## ", RUNBOOKS.read_text(), flags=re.M)[1:]:
        assert re.findall(r"^\*\*([\w ]+)\.\*\*", entry, re.M) == [
            "Meaning",
            "Diagnosis",
            "Remedy",
        ], entry.splitlines()[0]


def test_the_runbooks_read_only_series_of_the_service_that_exist() -> None:
    for query in runbook_queries():
        ours = {name for name in metrics_in(query) if name.startswith("drbert")}
        assert ours <= service_series() | recorded_series() | SETTINGS, query
