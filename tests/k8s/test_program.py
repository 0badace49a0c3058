"""The program helm, in its installed version, renders the same as the library."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.k8s.helm import CHART, KUBERNETES, NAME, NAMESPACE, Document, documents, render
from tests.k8s.profiles import EVERYTHING
from tests.requirements import helm


@helm
@pytest.mark.parametrize("name", EVERYTHING)
def test_the_program_renders_the_same(name: str, tmp_path: Path) -> None:
    def key(document: Document) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]

    (tmp_path / "values.json").write_text(json.dumps(EVERYTHING[name]))
    command = [
        "helm",
        "template",
        NAME,
        str(CHART),
        "--namespace",
        NAMESPACE,
        "--kube-version",
        f"{KUBERNETES}.0",
        "--values",
        str(tmp_path / "values.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(documents(done.stdout), key=key) == sorted(render(EVERYTHING[name]), key=key)
