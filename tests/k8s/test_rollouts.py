"""The example for Argo Rollouts fits the chart, the proof and the controller's schemas.

No controller has run it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from proof.plans.plan_file import read_plan
from tests.k8s.helm import Document, documents, render
from tests.k8s.profiles import of_kind
from tests.requirements import CRDS, crds

EXAMPLE = Path("k8s/examples/argo-rollouts.yaml")
KUBERNETES = "1.32"
CUSTOM = {"Rollout": "rollout_v1alpha1", "AnalysisTemplate": "analysistemplate_v1alpha1"}


@pytest.fixture
def objects() -> dict[tuple[str, str], Document]:
    return {
        (document["kind"], document["metadata"]["name"]): document
        for document in documents(EXAMPLE.read_text())
    }


def experiment_of(objects: dict[tuple[str, str], Document]) -> Document:
    steps = objects["Rollout", "drbert"]["spec"]["strategy"]["canary"]["steps"]
    [experiment] = [step["experiment"] for step in steps if "experiment" in step]
    assert isinstance(experiment, dict)
    return experiment


def test_kubernetes_knows_every_field(objects: dict[tuple[str, str], Document]) -> None:
    for (kind, _), document in objects.items():
        if kind not in CUSTOM:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    [metric] = objects["AnalysisTemplate", "drbert-proof"]["spec"]["metrics"]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "proof"},
        "spec": metric["provider"]["job"]["spec"],
    }
    kubernetes_validate.validate(job, KUBERNETES, strict=True)


@crds
def test_the_controller_knows_every_field(objects: dict[tuple[str, str], Document]) -> None:
    for (kind, _), document in objects.items():
        if kind in CUSTOM:
            schema = json.loads((CRDS / f"{CUSTOM[kind]}.json").read_text())
            faults = jsonschema.Draft7Validator(schema).iter_errors(document)
            assert [fault.message for fault in faults] == []


def test_the_rollout_takes_its_pods_from_the_chart(
    objects: dict[tuple[str, str], Document],
) -> None:
    values: dict[str, Any] = {"arms": {"bert": None, "drbert": {"madeByRollout": True}}}
    for flag in ("--set arms.bert=null", "--set arms.drbert.madeByRollout=true"):
        assert flag in EXAMPLE.read_text()
    [deployment] = of_kind(render(values, name="drbert"), "Deployment")
    assert deployment["spec"]["replicas"] == 0
    assert (
        objects["Rollout", "drbert"]["spec"]["workloadRef"]["name"]
        == deployment["metadata"]["name"]
    )


def test_the_proof_compares_the_experiments_pods(
    objects: dict[tuple[str, str], Document], tmp_path: Path
) -> None:
    (tmp_path / "plan.toml").write_text(objects["ConfigMap", "drbert-proof"]["data"]["plan.toml"])
    plan = read_plan(tmp_path / "plan.toml")
    experiment = experiment_of(objects)
    labels = {
        template["name"]: template["metadata"]["labels"] for template in experiment["templates"]
    }
    assert {template["specRef"] for template in experiment["templates"]} == {"stable", "canary"}
    assert all(template["replicas"] >= 2 * plan.restarts for template in experiment["templates"])
    selectors = {
        f"http://{name}.prod.svc:8000": document["spec"]["selector"]
        for (kind, name), document in objects.items()
        if kind == "Service"
    }
    for arm in plan.arms:
        if arm.url:
            assert (
                selectors[arm.url].items()
                <= labels["old" if arm.role == "reference" else "new"].items()
            )
    assert objects["AnalysisTemplate", experiment["analyses"][0]["templateName"]]


def test_no_service_of_the_release_selects_the_pods_that_are_measured(
    objects: dict[tuple[str, str], Document],
) -> None:
    release = render({"arms": {"bert": None}}, name="drbert")
    [deployment] = of_kind(release, "Deployment")
    for template in experiment_of(objects)["templates"]:
        labels = (
            deployment["spec"]["template"]["metadata"]["labels"] | template["metadata"]["labels"]
        )
        assert template["selector"]["matchLabels"].items() <= labels.items()
        for service in of_kind(release, "Service"):
            assert not service["spec"]["selector"].items() <= labels.items()
