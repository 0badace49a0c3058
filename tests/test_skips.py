"""A test may be skipped for one of the reasons in tests/requirements.py only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest


def test_no_test_is_skipped_except_by_a_marker_of_requirements() -> None:
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
                    f"{file}:{node.lineno} skips a test; use a marker of tests/requirements.py"
                )


def test_the_reasons_for_a_skip_are_known() -> None:
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
        "package_index",
        "strace",
        "counted_instructions",
        "sbom",
        "transformers_5",
    }
