"""
The Helm engine behind one door: what the chart renders to, what lint says, what is refused.

helm-python-sdk holds Helm's own Go library; nobody else imports it, so that the program `helm` could take its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml
from helm_python import _native

CHART = Path("k8s/chart")
NAME, NAMESPACE = "demo", "prod"
KUBERNETES = "1.32"

Document = dict[str, Any]
Values = Mapping[str, Any]


class Refused(Exception):
    """Helm does not render these values; the message is what its user sees."""


def render(values: Values, name: str = NAME, kubernetes: str = KUBERNETES, chart: Path = CHART) -> list[Document]:
    """Every object, hooks included, as `helm template` would print it for a cluster of that version."""
    return [
        document
        for path, text in rendered_files(values, name, kubernetes, chart).items() if path.endswith(".yaml")
        for document in documents(text)
    ]


def documents(text: str) -> list[Document]:
    """The objects in a stream of YAML, by the parser that is written in C."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document is not None]


def rendered_files(values: Values, name: str = NAME, kubernetes: str = KUBERNETES, chart: Path = CHART) -> dict[str, str]:
    """The text of every template, by its path."""
    release = {"name": name, "namespace": NAMESPACE, "kube_version": f"v{kubernetes}.0"}
    try:
        with helm_python.Chart.load(chart) as loaded:
            # The public `render` leaves the version of Kubernetes out.
            answer: dict[str, str] = json.loads(_native.call_string("helm_render", loaded._raw(), json.dumps(values), json.dumps(release)))
    except helm_python.HelmError as error:
        raise Refused(str(error)) from None
    return answer


def installed(values: Values, name: str = NAME) -> dict[str, Any]:
    """What `helm install --dry-run=client` says: `manifest` without hooks, and `notes`."""
    try:
        told: dict[str, Any] = helm_python.Config(namespace=NAMESPACE).install(str(CHART), name, dict(values), dry_run="client")
    except helm_python.HelmError as error:
        raise Refused(str(error)) from None
    return told


def lint(values: Values, kubernetes: str = KUBERNETES) -> list[str]:
    """What `helm lint --strict` complains of; advice is no complaint."""
    report = helm_python.lint(CHART, dict(values), strict=True, namespace=NAMESPACE, kube_version=f"v{kubernetes}.0")
    errors: list[str] = report["errors"]
    return [f"{said['path']}: {said['error']}" for said in report["messages"] if said["severity"] > 1] + errors


def default_values() -> dict[str, Any]:
    with helm_python.Chart.load(CHART) as loaded:
        values: dict[str, Any] = loaded.values
        return values
