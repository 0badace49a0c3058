"""Each profile and each feature renders to objects that Kubernetes and its operators accept."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s import helm
from tests.k8s.golden import FOLDER, golden
from tests.k8s.helm import Document, RenderError, installed, lint, render
from tests.k8s.profiles import EVERYTHING, PROFILES, minors, of_kind
from tests.requirements import CRDS, crds

OWN = json.dumps('{namespace="prod",release="demo"')[1:-1]
"""How the rules of this release select its series, in JSON."""
WITHOUT_A_SCHEMA = {"BackendTLSPolicy"}
"""Custom resources whose schema is not at hand; test_clusters.py checks their fields by name."""
CUSTOM = {
    "ServiceMonitor": "servicemonitor_v1",
    "PrometheusRule": "prometheusrule_v1",
    "ScaledObject": "scaledobject_v1alpha1",
    "HTTPRoute": "httproute_v1",
}


def chart_with_files(folder: Path) -> Path:
    """Return a copy of the chart with one more rule file and one more dashboard.

    Their braces are for Prometheus and Grafana to fill in, not for Helm.
    """
    chart = folder / "chart"
    shutil.copytree(helm.CHART, chart)
    (chart / "rules").mkdir(exist_ok=True)
    (chart / "rules" / "further.yaml").write_text(
        "groups:\n- name: further\n  rules:\n  - alert: Odd\n    expr: drbert_ready < 1\n   "
        ' annotations: {summary: "{{ $labels.arm }} of {{ $labels.release }}"}\n'
    )
    (chart / "dashboards").mkdir(exist_ok=True)
    (chart / "dashboards" / "further.json").write_text(
        '{\n  "title": "Further",\n  "legend": "{{arm}}"\n}\n'
    )
    return chart


@pytest.mark.parametrize("name", EVERYTHING)
def test_lint_reports_nothing(name: str) -> None:
    assert lint(EVERYTHING[name]) == []


@pytest.mark.parametrize("minor", minors("default"))
def test_kubernetes_knows_every_field_on_every_version(
    minor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a cache it reads its schemas, 3 MB, again for each object.
    monkeypatch.setattr(
        kubernetes_validate.utils,
        "schema_contents",
        functools.cache(kubernetes_validate.utils.schema_contents),
    )
    objects = {
        json.dumps(document): document
        for name, values in EVERYTHING.items()
        if minor in minors(name)
        for document in render(values, kubernetes=f"1.{minor}")
        if document["kind"] not in CUSTOM and document["kind"] not in WITHOUT_A_SCHEMA
    }
    for document in objects.values():
        kubernetes_validate.validate(document, f"1.{minor}", strict=True)


def test_a_misspelt_field_is_detected() -> None:
    [first, *_] = of_kind(render({}), "Deployment")
    first["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["pth"] = "/"
    with pytest.raises(kubernetes_validate.ValidationError, match="pth"):
        kubernetes_validate.validate(first, helm.KUBERNETES, strict=True)


@crds
@pytest.mark.parametrize("name", EVERYTHING)
def test_operators_know_every_field(name: str) -> None:
    for document in of_kind(render(EVERYTHING[name]), *CUSTOM):
        schema = json.loads((CRDS / f"{CUSTOM[document['kind']]}.json").read_text())
        faults = [
            f"{fault.json_path}: {fault.message}"
            for fault in jsonschema.Draft7Validator(schema).iter_errors(document)
        ]
        assert not faults, f"{document['kind']}: {faults}"


def test_every_kind_of_object_is_rendered_by_some_values() -> None:
    kinds = {document["kind"] for values in EVERYTHING.values() for document in render(values)}
    assert kinds >= {
        *CUSTOM,
        "Deployment",
        "Service",
        "Job",
        "Pod",
        "HorizontalPodAutoscaler",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "Ingress",
        "ConfigMap",
    }


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_installed_objects_are_the_checked_ones(name: str) -> None:
    def key(document: Document) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]

    release = installed(EVERYTHING[name])
    manifest = sorted(helm.documents(release["manifest"]), key=key)
    # The dry run renders for the default version of Kubernetes in Helm.
    checked = render(EVERYTHING[name], kubernetes="1.36")
    assert manifest == sorted(
        (d for d in checked if "helm.sh/hook" not in d["metadata"].get("annotations", {})), key=key
    )
    assert "port-forward svc/demo" in release["notes"]


@pytest.mark.parametrize("name", PROFILES)
def test_the_rendered_profiles_are_those_in_the_repository(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    assert path.exists(), f"{path} is missing; make chart-golden writes it"
    assert path.read_text() == golden(name), (
        f"{path} is not what the chart renders; `make chart-golden` updates it, and git diff shows"
        " what changed"
    )


def test_the_repository_holds_no_rendered_profile_that_was_removed() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(PROFILES)


def test_an_old_kubernetes_sleeps_by_a_command_before_a_pod_ends() -> None:
    for kubernetes, handler in (
        ("1.29", {"exec": {"command": ["sleep", "5"]}}),
        ("1.30", {"sleep": {"seconds": 5}}),
    ):
        [first, *_] = of_kind(render({}, kubernetes=kubernetes), "Deployment")
        assert first["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"] == handler


def test_an_old_kubernetes_that_cannot_mount_images_is_refused() -> None:
    with pytest.raises(
        RenderError,
        match=(
            r"Kubernetes v1\.30\.0 cannot mount; it takes 1\.35, or 1\.31 with the feature gate"
            r" ImageVolume, or model\.source: initContainer"
        ),
    ):
        render(PROFILES["production"], kubernetes="1.30")


def test_rules_and_dashboards_are_rendered_for_this_release_and_otherwise_unchanged(
    tmp_path: Path,
) -> None:
    chart = chart_with_files(tmp_path)
    values = {
        "monitoring": {
            "rules": {"enabled": True},
            "dashboards": {"enabled": True, "annotations": {"folder": "Models"}},
        }
    }
    documents = render(values, chart=chart)
    [rule] = of_kind(documents, "PrometheusRule")
    groups = {group["name"]: group for group in rule["spec"]["groups"]}
    for path in (chart / "rules").glob("*.yaml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            rendered = json.dumps(groups[group["name"]])
            for selector, otherwise in ((f"{OWN},", "{"), (f"{OWN}}}", "")):
                rendered = rendered.replace(selector, otherwise)
            assert json.loads(rendered) == group
    boards = {
        name: text
        for config in of_kind(documents, "ConfigMap")
        for name, text in config["data"].items()
    }
    for path in (chart / "dashboards").glob("*.json"):
        rendered = boards[f"prod_demo_{path.name}"]
        rendered = re.sub(
            r'\n *"current": {"selected": true, "text": "(prod|demo)".*', "", rendered
        )
        rendered = re.sub(r"drbert-twins-\w{12}", "drbert-twins", rendered)
        rendered = rendered.replace("DrBERT twins: demo in prod", "DrBERT twins")
        assert rendered == path.read_text().strip()
    labels = [
        config["metadata"]["labels"]["grafana_dashboard"]
        for config in of_kind(documents, "ConfigMap")
    ]
    assert labels == ["1"] * len(boards)


def test_alerts_link_to_the_runbooks_of_the_values() -> None:
    [rule] = of_kind(
        render(
            {"monitoring": {"rules": {"enabled": True, "runbooks": "https://wiki.example/drbert"}}}
        ),
        "PrometheusRule",
    )
    pages = {
        each["annotations"]["runbook_url"].partition("#")[0]
        for group in rule["spec"]["groups"]
        for each in group["rules"]
        if "alert" in each
    }
    assert pages == {"https://wiki.example/drbert"}


def test_rules_record_the_settings_of_the_values() -> None:
    [rule] = of_kind(
        render(
            {
                "monitoring": {"rules": {"enabled": True, "margin": 0.01}},
                "settings": {"max_waiting": 5_000_000},
            }
        ),
        "PrometheusRule",
    )
    [settings] = [group for group in rule["spec"]["groups"] if group["name"] == "settings"]
    release = {"namespace": "prod", "release": "demo"}
    assert settings["rules"] == [
        {
            "record": "drbert:setting:arm",
            "expr": "vector(1)",
            "labels": {"arm": "bert", "role": "reference"} | release,
        },
        {
            "record": "drbert:setting:arm",
            "expr": "vector(1)",
            "labels": {"arm": "drbert", "role": "candidate"} | release,
        },
        {"record": "drbert:setting:margin", "expr": "vector(0.01)", "labels": release},
        {"record": "drbert:setting:error_budget", "expr": "vector(0.001)", "labels": release},
        {"record": "drbert:setting:max_waiting", "expr": "vector(5000000)", "labels": release},
    ]
