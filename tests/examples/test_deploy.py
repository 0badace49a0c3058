"""The examples for deployment without Kubernetes name what there is."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from service.settings import variable_names
from tests.requirements import PROMTOOL, prometheus

DEPLOY = Path("examples/deploy")


def test_every_file_that_compose_mounts_exists() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounted = [
        mount.split(":")[0] for service in services.values() for mount in service.get("volumes", [])
    ]
    assert len(mounted) == 5
    for path in mounted:
        assert (DEPLOY / path).exists(), path


@pytest.mark.parametrize("name", ["compose.yaml", "drbert-serve.service", "nginx.conf"])
def test_every_setting_that_an_example_names_exists(name: str) -> None:
    named = set(re.findall(r"DRBERT_[A-Z_]+", (DEPLOY / name).read_text()))
    # The unit also names all of them at once.
    assert named - {"DRBERT_"} <= set(variable_names())


def test_the_unit_starts_our_script_and_waits_longer_than_the_drain() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "drbert-serve.service")
    service = unit["Service"]
    assert service["ExecStart"].split()[0] == "/opt/drbert-serve/bin/drbert-serve"
    assert int(service["TimeoutStopSec"]) > 20
    assert service["RestartPreventExitStatus"] == "64 65 69"


def test_the_rules_settings_are_those_that_the_charts_rules_read() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus/settings.yaml").read_text())
    recorded = {rule["record"] for group in settings["groups"] for rule in group["rules"]}
    rules = "".join(path.read_text() for path in Path("k8s/chart/rules").glob("*.yaml"))
    assert recorded == set(re.findall(r"drbert:setting:\w+", rules))


@prometheus
def test_prometheus_accepts_its_configuration_with_the_charts_rules(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    shutil.copytree(DEPLOY / "prometheus", tmp_path, dirs_exist_ok=True)
    shutil.copytree("k8s/chart/rules", tmp_path / "chart")
    done = subprocess.run(
        [PROMTOOL, "check", "config", "prometheus.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
