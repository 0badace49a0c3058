"""
Runs Helm's Go library in a process of its own: one JSON request per line of stdin, one JSON answer
per line of stdout.

The process is separate, because a Go runtime aborted next to the engines that other tests load. No
other module imports helm-python-sdk, so the program `helm` could replace it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import helm_python
from helm_python import _native


def rendered_files(chart: str, values: dict[str, Any], release: dict[str, str]) -> Any:
    with helm_python.Chart.load(chart) as loaded:
        # The public `render` does not pass the version of Kubernetes.
        return json.loads(
            _native.call_string(
                "helm_render", loaded._raw(), json.dumps(values), json.dumps(release)
            )
        )


def installed(chart: str, values: dict[str, Any], name: str, namespace: str) -> Any:
    return helm_python.Config(namespace=namespace).install(chart, name, values, dry_run="client")


def lint(chart: str, values: dict[str, Any], kubernetes: str, namespace: str) -> Any:
    return helm_python.lint(
        chart, values, strict=True, namespace=namespace, kube_version=f"v{kubernetes}.0"
    )


def default_values(chart: str) -> Any:
    with helm_python.Chart.load(chart) as loaded:
        return loaded.values


QUESTIONS = {
    question.__name__: question for question in (rendered_files, installed, lint, default_values)
}


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": QUESTIONS[request["question"]](**request["arguments"])}
        except helm_python.HelmError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
