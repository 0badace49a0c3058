"""
Renders, lints and installs the chart by Helm itself, which runs in helm_engine.py.
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


class RenderError(Exception):
    """Helm does not render these values; the message is the one that its user sees."""


def render(
    values: Values, name: str = NAME, kubernetes: str = KUBERNETES, chart: Path = CHART
) -> list[Document]:
    """Return all objects, hooks included, as `helm template` prints them.

    `kubernetes` is the version of the cluster.
    """
    objects: list[Document] = []
    for path, text in rendered_files(values, name, kubernetes, chart).items():
        if path.endswith(".yaml"):
            objects += documents(text)
    return objects


def documents(text: str) -> list[Document]:
    """Return the objects in a stream of YAML, by the parser that is written in C."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document is not None]


def rendered_files(
    values: Values, name: str = NAME, kubernetes: str = KUBERNETES, chart: Path = CHART
) -> dict[str, str]:
    """Return the text of each template by its path."""
    release = {"name": name, "namespace": NAMESPACE, "kube_version": f"v{kubernetes}.0"}
    files: dict[str, str] = _ask(
        "rendered_files", chart=str(chart), values=dict(values), release=release
    )
    return files


def installed(values: Values, name: str = NAME) -> dict[str, Any]:
    """Return what `helm install --dry-run=client` prints: `manifest` without hooks, and `notes`."""
    release: dict[str, Any] = _ask(
        "installed", chart=str(CHART), values=dict(values), name=name, namespace=NAMESPACE
    )
    return release


def lint(values: Values, kubernetes: str = KUBERNETES) -> list[str]:
    """Return the warnings and errors of `helm lint --strict`; its advice is left out."""
    report = _ask(
        "lint", chart=str(CHART), values=dict(values), kubernetes=kubernetes, namespace=NAMESPACE
    )
    findings: list[str] = []
    for message in report["messages"]:
        if message["severity"] > 1:
            findings.append(f"{message['path']}: {message['error']}")
    return findings + list(report["errors"])


def default_values() -> dict[str, Any]:
    """Return the values of values.yaml."""
    values: dict[str, Any] = _ask("default_values", chart=str(CHART))
    return values


def _ask(question: str, **arguments: Any) -> Any:
    """Send a question to Helm's process and return its answer."""
    engine = _engine()
    assert engine.stdin is not None
    assert engine.stdout is not None
    engine.stdin.write(json.dumps({"question": question, "arguments": arguments}) + "\n")
    engine.stdin.flush()
    line = engine.stdout.readline()
    assert line, f"Helm's process ended with {engine.wait()}"
    answer = json.loads(line)
    if "refused" in answer:
        raise RenderError(answer["refused"])
    return answer["answer"]


@functools.cache
def _engine() -> subprocess.Popen[str]:
    """Return Helm's process, which is started once and ends with this one."""
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
