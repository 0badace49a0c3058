"""A pod of the chart without a cluster: the service, and the script of `helm test` against it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme

from service.artifact import Artifact
from tests.k8s.helm import Document, render
from tests.k8s.profiles import containers, of_kind
from tests.service.test_server import free_port, running, serving


def default_pods() -> tuple[Document, Document]:
    """Return the container of the reference arm, and that of the test."""
    documents = render({})
    [first, *_] = of_kind(documents, "Deployment")
    [test] = of_kind(documents, "Pod")
    return containers(first["spec"]["template"]["spec"])[0], containers(test["spec"])[0]


def helm_test(*urls: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script of `helm test` against services."""
    python, *command = default_pods()[1]["command"]
    assert python == "python"
    return subprocess.run(
        [sys.executable, *command, *urls],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_a_pod_of_the_default_values_classifies(artifact: Artifact) -> None:
    container, test = default_pods()
    model, *options = container["args"]
    assert model == "bert=/models/bert"
    assert options == ["--host", "::", "--port", "8000"]
    assert test["args"] == ["http://demo-bert:8000", "http://demo-drbert:8000"]
    with serving(artifact, "bert") as (url, _):
        done = helm_test(url, url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == 2 * [f"{url}: bert answers NEGATIVE 0.500"]


def test_the_test_sends_a_key_over_https_where_the_service_requires_both(
    artifact: Artifact, tmp_path: Path
) -> None:
    issued = trustme.CA().issue_cert("classify.example")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    issued.private_key_pem.write_to_path(tmp_path / "tls.key")
    keys = "# reviews team\nopen#sesame    # until June\n"
    (tmp_path / "keys").write_text(keys)
    variables: dict[str, Any] = {
        "DRBERT_API_KEYS_FILE": str(tmp_path / "keys"),
        "DRBERT_TLS_CERTIFICATE": str(tmp_path / "tls.crt"),
        "DRBERT_TLS_KEY": str(tmp_path / "tls.key"),
    }
    with running(f"bert={artifact.directory}", scheme="https", **variables) as (url, _):
        assert helm_test(url, KEYS=keys).returncode == 0
        refused = helm_test(url)
    assert (refused.returncode, refused.stderr) == (1, f"{url}: HTTP Error 401: Unauthorized\n")


def test_the_test_fails_for_an_arm_that_does_not_answer() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = helm_test(url, PATIENCE_S="0")
    assert done.returncode == 1
    assert url in done.stderr


@pytest.mark.parametrize("status", ["found", "changed", "missing"])
def test_a_model_with_another_digest_is_refused(
    status: str, artifact: Artifact, tmp_path: Path
) -> None:
    digest = artifact.digest if status == "found" else "0" * 64
    manifest = artifact.directory / ("elsewhere.json" if status == "missing" else "manifest.json")
    [first, *_] = of_kind(render({"arms": {"bert": {"model": {"digest": digest}}}}), "Deployment")
    [check] = first["spec"]["template"]["spec"]["initContainers"]
    done = subprocess.run(
        check["command"],
        env={"DIGEST": digest, "MANIFEST": str(manifest)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (status == "found")
    assert str(manifest) in done.stdout
