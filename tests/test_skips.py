"""On a full machine nothing is skipped but for want of a GPU, of Debian's tools, of Helm, of
transformers 5 or of the research data.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest


def test_a_test_is_skipped_only_for_a_reason_in_needs() -> None:
    for file in Path("tests").rglob("*.py"):
        if file.name == "requirements.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in (
                "skip",
                "skipif",
                "importorskip",
                "xfail",
            ):
                raise AssertionError(
                    f"{file}:{node.lineno} skips by itself; use a marker of tests/requirements.py"
                )


def test_needs_knows_every_reason() -> None:
    from tests import requirements

    marks = {
        name: value
        for name, value in vars(requirements).items()
        if isinstance(value, pytest.MarkDecorator)
    }
    assert set(marks) == {
        "shared_data",
        "crds",
        "helm",
        "no_gpu",
        "chromium",
        "wrk",
        "prometheus",
        "containers",
        "grafana",
        "strace",
        "sbom",
        "transformers_5",
    }
