"""
What the chart renders to, what lint says, and what is refused, by Helm itself (helm_engine.py).
"""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CHART = Path("k8s/chart")
NAME, NAMESPACE = "demo", "prod"
KUBERNETES = "1.32"

Document = dict[str, Any]
Values = Mapping[str, Any]


class Refused(Exception):
    """Helm does not render these values; the message is what its user sees."""


def render(
    values: Values, name: str = NAME, kubernetes: str = KUBERNETES, chart: Path = CHART
) -> list[Document]:
    """Every object, hooks included, as `helm template` would print it for a cluster of that
    version.
    """
    return [
        document
        for path, text in rendered_files(values, name, kubernetes, chart).items()
        if path.endswith(".yaml")
        for document in documents(text)
    ]


def documents(text: str) -> list[Document]:
    """The objects in a stream of YAML, by the parser that is written in C."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document is not None]


def rendered_files(
    values: Values, name: str = NAME, kubernetes: str = KUBERNETES, chart: Path = CHART
) -> dict[str, str]:
    """The text of every template, by its path."""
    release = {"name": name, "namespace": NAMESPACE, "kube_version": f"v{kubernetes}.0"}
    files: dict[str, str] = _ask(
        "rendered_files", chart=str(chart), values=dict(values), release=release
    )
    return files


def installed(values: Values, name: str = NAME) -> dict[str, Any]:
    """What `helm install --dry-run=client` says: `manifest` without hooks, and `notes`."""
    told: dict[str, Any] = _ask(
        "installed", chart=str(CHART), values=dict(values), name=name, namespace=NAMESPACE
    )
    return told


def lint(values: Values, kubernetes: str = KUBERNETES) -> list[str]:
    """What `helm lint --strict` complains of; advice is no complaint."""
    report = _ask(
        "lint", chart=str(CHART), values=dict(values), kubernetes=kubernetes, namespace=NAMESPACE
    )
    errors: list[str] = report["errors"]
    return [
        f"{said['path']}: {said['error']}" for said in report["messages"] if said["severity"] > 1
    ] + errors


def default_values() -> dict[str, Any]:
    values: dict[str, Any] = _ask("default_values", chart=str(CHART))
    return values


def _ask(question: str, **told: Any) -> Any:
    engine = _engine()
    assert engine.stdin is not None
    assert engine.stdout is not None
    engine.stdin.write(json.dumps({"question": question, "told": told}) + "\n")
    engine.stdin.flush()
    line = engine.stdout.readline()
    assert line, f"Helm's process ended with {engine.wait()}"
    answer = json.loads(line)
    if "refused" in answer:
        raise Refused(answer["refused"])
    return answer["answer"]


@functools.cache
def _engine() -> subprocess.Popen[str]:
    """Helm's process, started once and ended with this one."""
    engine = subprocess.Popen(
        [sys.executable, "-m", "tests.k8s.helm_engine"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def end() -> None:
        engine.communicate()

    atexit.register(end)
    return engine
