"""The objects of a release fit each other, which no schema checks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proof.plans.plan_file import read_plan
from tests.k8s.helm import Document, render
from tests.k8s.profiles import (
    DIGEST,
    EVERYTHING,
    FEATURES,
    PROFILES,
    containers,
    of_kind,
    pod_specs,
)

LONGEST_NAME = "a-release-whose-name-is-as-long-as-helm-permits-it-be"
EXIT_S = 10
"""Seconds that a service needs to end after it has drained."""


@pytest.fixture(params=EVERYTHING)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return render(EVERYTHING[request.param])


def pods(documents: list[Document]) -> Iterator[tuple[dict[str, str], Document]]:
    """Yield the labels and the spec of each kind of pod in the release."""
    for document, spec in pod_specs(documents):
        template = document if document["kind"] == "Pod" else document["spec"]["template"]
        yield template["metadata"]["labels"], spec


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Return whether a selector matches some labels."""
    return selector.items() <= labels.items()


def arms(documents: list[Document]) -> dict[str, Document]:
    """Return the Deployment of each arm."""
    return {
        document["metadata"]["labels"]["arm"]: document
        for document in of_kind(documents, "Deployment")
    }


def drbert(deployment: Document) -> Document:
    """Return the container of the service in a Deployment."""
    spec = deployment["spec"]["template"]["spec"]
    [container] = [container for container in spec["containers"] if container["name"] == "drbert"]
    assert isinstance(container, dict)
    return container


def test_every_object_is_in_the_namespace_of_the_release_and_has_a_unique_name(
    documents: list[Document],
) -> None:
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(set(names)) == len(names)
    assert {document["metadata"]["namespace"] for document in documents} == {"prod"}


@pytest.mark.parametrize("name", EVERYTHING)
def test_names_are_valid_for_the_longest_name_of_a_release(name: str) -> None:
    assert len(LONGEST_NAME) == 53
    documents = render(EVERYTHING[name], name=LONGEST_NAME)
    for document in documents:
        # KEDA makes a label of "keda-hpa-" and the name.
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,52}[a-z0-9])?", document["metadata"]["name"]), (
            document["metadata"]["name"]
        )
        labels = document["metadata"].get("labels", {})
        assert all(
            re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", value)
            for value in labels.values()
        ), labels
    kinds = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(set(kinds)) == len(kinds)


def test_a_deployment_selects_its_own_pods_and_no_others(documents: list[Document]) -> None:
    for arm, deployment in arms(documents).items():
        selector = deployment["spec"]["selector"]["matchLabels"]
        assert [labels["arm"] for labels, _ in pods(documents) if selects(selector, labels)] == [
            arm
        ]
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(selector), (
            "a selector cannot change, and these do"
        )


def test_arms_differ_only_in_their_model() -> None:
    two: dict[str, Any] = {
        "bert": None,
        "drbert": None,
        "first": {"role": "reference"},
        "second": {"role": "candidate"},
    }
    for values in EVERYTHING.values():
        deployments = arms(render({**values, "arms": two}))
        assert set(deployments) == {"first", "second"}
        digests: set[str] = set()
        specs: set[str] = set()
        for deployment in deployments.values():
            digests.add(deployment["spec"]["template"]["metadata"]["labels"].pop("pod-spec"))
            specs.add(re.sub(r"\b(first|second)\b", "ARM", json.dumps(deployment["spec"])))
        assert len(digests) == 2
        assert len(specs) == 1


def test_services_select_pods_of_arms_and_ports_that_exist(documents: list[Document]) -> None:
    services = {
        document["metadata"]["name"]: document for document in of_kind(documents, "Service")
    }
    assert {"demo", "demo-bert", "demo-drbert"} <= set(services)
    for name, service in services.items():
        selected = [
            (labels, spec)
            for labels, spec in pods(documents)
            if selects(service["spec"]["selector"], labels)
        ]
        assert len(selected) == (len(arms(documents)) if name == "demo" else 1), name
        for labels, spec in selected:
            assert labels["app.kubernetes.io/component"] == "arm"
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= {
                port["name"] for c in spec["containers"] for port in c.get("ports", [])
            }


def test_every_object_that_a_pod_uses_is_rendered_or_documented_to_exist(
    documents: list[Document],
) -> None:
    rendered = {(document["kind"], document["metadata"]["name"]) for document in documents}
    existing = {
        ("Secret", name) for name in ("keys", "certificate", "admins", "store", "drbert-keys")
    } | {
        ("ConfigMap", "authority"),
        ("PersistentVolumeClaim", "models"),
        ("PersistentVolumeClaim", "engines"),
        ("PersistentVolumeClaim", "evidence"),
        ("ServiceAccount", "default"),
    }
    for _, spec in pod_specs(documents):
        assert set(references(spec)) <= rendered | existing


def references(spec: Document) -> Iterator[tuple[str, str]]:
    """Yield kind and name of each object that the spec of a pod refers to."""
    yield "ServiceAccount", spec["serviceAccountName"]
    for volume in spec.get("volumes", []):
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in containers(spec):
        for source in container.get("envFrom", []):
            yield "Secret", source["secretRef"]["name"]
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                yield "Secret", variable["valueFrom"]["secretKeyRef"]["name"]


def test_every_volume_of_a_pod_is_mounted_and_every_mount_has_a_volume(
    documents: list[Document],
) -> None:
    for _, spec in pod_specs(documents):
        mounted: set[str] = set()
        for container in containers(spec):
            mounts = container.get("volumeMounts", [])
            assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
            mounted |= {mount["name"] for mount in mounts}
        assert mounted == {volume["name"] for volume in spec.get("volumes", [])}


def test_probes_use_ports_that_exist_and_liveness_is_not_readiness(
    documents: list[Document],
) -> None:
    for deployment in arms(documents).values():
        container = drbert(deployment)
        probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
        assert {probe["httpGet"]["port"] for probe in probes.values()} <= {
            port["name"] for port in container["ports"]
        }
        assert (
            probes["liveness"]["httpGet"]["path"]
            == "/livez"
            != probes["readiness"]["httpGet"]["path"]
            == "/readyz"
        )
        assert probes["liveness"]["failureThreshold"] >= 5
        https = any(mount["name"] == "tls" for mount in container["volumeMounts"])
        assert {probe["httpGet"].get("scheme", "HTTP") for probe in probes.values()} == {
            "HTTPS" if https else "HTTP"
        }


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_pod_may_start_for_as_long_as_a_model_may_load(name: str) -> None:
    load_timeout_s = EVERYTHING[name].get("model", {}).get("loadTimeoutSeconds", 120)
    for deployment in arms(render(EVERYTHING[name])).values():
        probe = drbert(deployment)["startupProbe"]
        assert probe["failureThreshold"] * probe["periodSeconds"] >= load_timeout_s


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_rollout_does_not_fail_while_a_model_may_load(name: str) -> None:
    load_timeout_s = EVERYTHING[name].get("model", {}).get("loadTimeoutSeconds", 120)
    min_ready_s = EVERYTHING[name].get("rollout", {}).get("minReadySeconds", 0)
    for deployment in arms(render(EVERYTHING[name])).values():
        deadline_s = deployment["spec"]["progressDeadlineSeconds"]
        assert deadline_s >= load_timeout_s + min_ready_s + 600


def test_the_grace_period_of_a_pod_is_long_enough_to_drain(documents: list[Document]) -> None:
    for deployment in arms(documents).values():
        container = drbert(deployment)
        variables = {
            variable["name"]: variable.get("value") for variable in container.get("env", [])
        }
        pre_stop = (
            container["lifecycle"]["preStop"]["sleep"]["seconds"] if "lifecycle" in container else 0
        )
        drain = float(variables.get("DRBERT_DRAIN_TIMEOUT_S") or 20)
        assert (
            deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
            >= pre_stop + drain + EXIT_S
        )


def test_an_autoscaler_targets_a_deployment_and_alone_sets_its_replicas(
    documents: list[Document],
) -> None:
    targets = [
        document["spec"]["scaleTargetRef"]["name"]
        for document in of_kind(documents, "HorizontalPodAutoscaler", "ScaledObject")
    ]
    deployments = {
        deployment["metadata"]["name"]: deployment for deployment in arms(documents).values()
    }
    assert len(set(targets)) == len(targets)
    assert set(targets) in (set(), set(deployments))
    [named] = {"replicas" in deployment["spec"] for deployment in deployments.values()}
    if targets:
        assert not named


def test_no_pod_is_removed_while_prometheus_is_unreachable() -> None:
    scaled = of_kind(render(PROFILES["production"]), "ScaledObject")
    assert scaled
    for document in scaled:
        # KEDA would scale to the number of its fallback; before version 2.17 it ignores `behavior`.
        assert "fallback" not in document["spec"]
        assert document["spec"]["minReplicaCount"] >= 1
        for trigger in document["spec"]["triggers"]:
            assert trigger["metadata"]["ignoreNullValues"] == "false"
            assert "or vector(0)" not in trigger["metadata"]["query"]
    for document in of_kind(render(FEATURES["hpa"]), "HorizontalPodAutoscaler"):
        # With several metrics the readable ones may scale in; with one metric nothing can.
        [metric] = document["spec"]["metrics"]
        assert metric["type"] == "Pods"


def test_budgets_cover_every_arm_and_let_a_single_pod_be_drained(
    documents: list[Document],
) -> None:
    budgets = of_kind(documents, "PodDisruptionBudget")
    for budget in budgets:
        assert "minAvailable" not in budget["spec"]
        assert [
            labels["arm"]
            for labels, _ in pods(documents)
            if selects(budget["spec"]["selector"]["matchLabels"], labels)
        ] == [budget["metadata"]["labels"]["arm"]]
    assert len(budgets) in (0, len(arms(documents)))


def test_the_network_policy_covers_the_arms_and_admits_metrics_tests_and_proof(
    documents: list[Document],
) -> None:
    for policy in of_kind(documents, "NetworkPolicy"):
        chosen = [
            labels["app.kubernetes.io/component"]
            for labels, _ in pods(documents)
            if selects(policy["spec"]["podSelector"]["matchLabels"], labels)
        ]
        assert chosen == ["arm"] * len(arms(documents))
        [clients, *others] = policy["spec"]["ingress"]
        assert clients["ports"] == [{"port": "http", "protocol": "TCP"}]
        for port in {
            endpoint["port"]
            for monitor in of_kind(documents, "ServiceMonitor")
            for endpoint in monitor["spec"]["endpoints"]
        }:
            anybody = port == "http" and "from" not in clients
            assert anybody or [
                rule
                for rule in others
                if rule["ports"] == [{"port": port, "protocol": "TCP"}] and rule["from"]
            ], "no peer can scrape it"
        for labels, _ in pods(documents):
            if labels["app.kubernetes.io/component"] in ("test", "proof") and "from" in clients:
                assert any(
                    selects(peer["podSelector"]["matchLabels"], labels)
                    for peer in clients["from"]
                    if "podSelector" in peer
                )


def test_metrics_are_scraped_by_the_scheme_of_the_pods(documents: list[Document]) -> None:
    variables = {
        variable["name"]
        for _, pod in pods(documents)
        for container in pod["containers"]
        for variable in container.get("env", [])
    }
    for monitor in of_kind(documents, "ServiceMonitor"):
        [endpoint] = monitor["spec"]["endpoints"]
        assert endpoint.get("scheme", "http") == (
            "https" if "DRBERT_TLS_CERTIFICATE" in variables else "http"
        )


def test_every_pod_is_scraped_once_and_labelled_by_release_and_arm(
    documents: list[Document],
) -> None:
    for monitor in of_kind(documents, "ServiceMonitor"):
        [endpoint] = monitor["spec"]["endpoints"]
        services = [
            s
            for s in of_kind(documents, "Service")
            if selects(monitor["spec"]["selector"]["matchLabels"], s["metadata"]["labels"])
        ]
        for service in services:
            assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        for arm in arms(documents):
            [labels] = [labels for labels, _ in pods(documents) if labels.get("arm") == arm]
            assert sum(selects(service["spec"]["selector"], labels) for service in services) == 1
            # The rules join by the labels that the relabelings take from the pod.
            sources = {
                rule["targetLabel"]: (
                    rule["sourceLabels"][0].removeprefix("__meta_kubernetes_pod_label_")
                )
                for rule in endpoint["relabelings"]
            }
            by_meta_name = {
                re.sub(r"[^a-zA-Z0-9_]", "_", name): value for name, value in labels.items()
            }
            assert {target: by_meta_name[source] for target, source in sources.items()} == {
                "arm": arm,
                "release": "demo",
            }


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_pod_has_no_more_privileges_than_it_needs(name: str) -> None:
    for _, spec in pod_specs(render(EVERYTHING[name])):
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        ids = {spec["securityContext"].get(key) for key in ("runAsUser", "runAsGroup", "fsGroup")}
        assert ids == ({None} if name == "openshift" else {10001})
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in containers(spec):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            assert "latest" not in container["image"]
            assert re.search(r"(:[^/:]+|@sha256:[0-9a-f]{64})$", container["image"])


def test_root_filesystems_are_read_only_unless_the_values_say_otherwise() -> None:
    for name, values in EVERYTHING.items():
        for _, spec in pod_specs(render(values)):
            for container in containers(spec):
                assert container["securityContext"]["readOnlyRootFilesystem"] is (name != "mig")
            assert not any("hostPath" in volume for volume in spec.get("volumes", []))


@pytest.mark.parametrize(
    ("name", "resource"), [("gpu", "nvidia.com/gpu"), ("mig", "nvidia.com/mig-1g.10gb")]
)
def test_gpus_are_whole_and_their_requests_equal_their_limits(name: str, resource: str) -> None:
    for deployment in arms(render(EVERYTHING[name])).values():
        resources = drbert(deployment)["resources"]
        assert resources["requests"][resource] == resources["limits"][resource] == 1
        assert {
            "key": "nvidia.com/gpu",
            "operator": "Exists",
            "effect": "NoSchedule",
        } in deployment["spec"]["template"]["spec"]["tolerations"]


def test_a_model_of_a_volume_is_mounted_read_only_and_checked_by_its_digest() -> None:
    for name in ("init-container", "volumes"):
        for arm, deployment in arms(render(FEATURES[name])).items():
            spec = deployment["spec"]["template"]["spec"]
            [argument] = [a for a in drbert(deployment)["args"] if "=" in a]
            checks = {c["name"]: c for c in spec.get("initContainers", [])}
            if arm == "drbert-large":
                assert not checks
                continue
            variables = {
                variable["name"]: variable["value"] for variable in checks["digest"]["env"]
            }
            assert variables == {
                "DIGEST": DIGEST,
                "MANIFEST": f"{argument.partition('=')[2]}/manifest.json",
            }
            assert list(checks)[-1] == "digest", "the model is checked before it is downloaded"
            for mount in drbert(deployment)["volumeMounts"]:
                assert mount["name"] != "models" or mount["readOnly"]


def test_an_arm_can_override_the_values_of_the_release() -> None:
    deployments = arms(render(FEATURES["volumes"]))
    assert drbert(deployments["bert"])["args"][0] == "bert=/models/v3"
    assert drbert(deployments["drbert"])["args"][0] == "reviews=/models/drbert"
    assert drbert(deployments["drbert"])["image"] == "drbert-serve:0.2.0"
    policies = {
        arm: {c["imagePullPolicy"] for c in containers(deployment["spec"]["template"]["spec"])}
        for arm, deployment in deployments.items()
    }
    assert policies == {
        "bert": {"IfNotPresent"},
        "drbert": {"Always"},
        "drbert-large": {"IfNotPresent"},
    }
    assert drbert(deployments["drbert-large"])["image"] == f"drbert-serve@sha256:{DIGEST}"
    assert {arm: deployment["spec"]["replicas"] for arm, deployment in deployments.items()} == {
        "bert": 1,
        "drbert": 2,
        "drbert-large": 1,
    }


def test_routes_refer_to_services_and_ports_of_the_release() -> None:
    for name, kind in (("production", "HTTPRoute"), ("ingress", "Ingress")):
        documents = render(EVERYTHING[name])
        services = {
            d["metadata"]["name"]: {p["name"]: p["port"] for p in d["spec"]["ports"]}
            for d in of_kind(documents, "Service")
        }
        [route] = of_kind(documents, kind)
        if kind == "HTTPRoute":
            backends: list[dict[str, Any]] = route["spec"]["rules"][0]["backendRefs"]
            assert {backend["name"]: backend["weight"] for backend in backends} == {
                "demo-bert": 90,
                "demo-drbert": 10,
            }
            assert all(
                backend["port"] in services[backend["name"]].values() for backend in backends
            )
        else:
            backend = route["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
            assert backend["port"]["name"] in services[backend["name"]]


@pytest.mark.parametrize("name", ["ab-proof", "proof-by-client"])
def test_the_job_runs_a_plan_that_the_proof_can_read(name: str, tmp_path: Path) -> None:
    documents = render(EVERYTHING[name])
    [job] = of_kind(documents, "Job")
    [config] = [c for c in of_kind(documents, "ConfigMap") if "plan.toml" in c["data"]]
    (tmp_path / "plan.toml").write_text(config["data"]["plan.toml"])
    plan = read_plan(tmp_path / "plan.toml")
    headless = {
        f"http://{s['metadata']['name']}.prod.svc:8000": s["metadata"]["labels"]["arm"]
        for s in of_kind(documents, "Service")
        if s["spec"].get("clusterIP") == "None"
    }
    assert [(arm.name, arm.role, headless.get(arm.url or "")) for arm in plan.arms] == [
        ("bert", "reference", "bert"),
        ("bert-again", "reference", "bert"),
        ("drbert", "candidate", "drbert"),
        ("drbert-again", "candidate", "drbert"),
        ("bert-delayed", "delayed", None),
    ]
    deployment = arms(documents)["bert"]
    assert deployment["spec"]["replicas"] >= 2 * plan.restarts
    assert plan.instances
    if plan.pilot is not None:
        assert (
            hashlib.sha256(config["data"][plan.pilot_path.name].encode()).hexdigest() == plan.pilot
        )
    assert (plan.pilot is None) == (name == "ab-proof")
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["run", "/plan/plan.toml", "--evidence", "/evidence"]
    assert {arm.headers_env for arm in plan.arms if arm.url} <= {None} | {
        variable["name"] for variable in container["env"]
    }
    assert job["spec"]["backoffLimit"] == 0
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_another_plan_or_image_is_another_job() -> None:
    values = PROFILES["ab-proof"]
    names = {
        of_kind(render({**values, "proof": {"enabled": True, **more}}), "Job")[0]["metadata"][
            "name"
        ]
        for more in (
            {},
            {"seed": 2},
            {"texts": "good film"},
            {"resources": {"limits": {"cpu": "3"}}},
            {"image": {"tag": "0.2.0"}},
        )
    }
    assert len(names) == 5


@pytest.mark.parametrize(
    "changed",
    [
        {"arms": {"drbert": {"image": {"tag": "0.2.0"}}}},
        {"arms": {"bert": {"artifact": "/models/drbert"}}},
        {"arms": {"drbert": {"model": {"digest": DIGEST}}}},
        {"settings": {**PROFILES["ab-proof"]["settings"], "max_batch_size": 8}},
        {"variant": "cpu-fp32"},
    ],
    ids=str,
)
def test_other_pods_are_another_job_which_measures_no_pod_of_an_earlier_rollout(
    changed: dict[str, Any],
) -> None:
    before, after = render(PROFILES["ab-proof"]), render({**PROFILES["ab-proof"], **changed})
    [old], [new] = of_kind(before, "Job"), of_kind(after, "Job")
    assert old["metadata"]["name"] != new["metadata"]["name"]
    selectors = [
        service["spec"]["selector"]
        for service in of_kind(after, "Service")
        if service["spec"].get("clusterIP") == "None"
    ]
    for arm, deployment in arms(after).items():
        [selector] = [selector for selector in selectors if selector["arm"] == arm]
        assert selects(selector, deployment["spec"]["template"]["metadata"]["labels"])
        earlier = arms(before)[arm]["spec"]["template"]
        assert selects(selector, earlier["metadata"]["labels"]) == (
            earlier == deployment["spec"]["template"]
        )


def test_an_unchanged_pod_is_not_measured_again() -> None:
    with_budget = {**PROFILES["ab-proof"], "podDisruptionBudget": {"enabled": True}}
    [before] = of_kind(render(PROFILES["ab-proof"]), "Job")
    [after] = of_kind(render(with_budget), "Job")
    assert before["metadata"]["name"] == after["metadata"]["name"]


def test_alerts_ignore_an_arm_without_replicas_unless_a_rollout_makes_its_pods() -> None:
    def monitored_arms(**arm: Any) -> set[str]:
        documents = render({"arms": {"drbert": arm}, "monitoring": {"rules": {"enabled": True}}})
        [rules] = of_kind(documents, "PrometheusRule")
        return {
            rule["labels"]["arm"]
            for group in rules["spec"]["groups"]
            for rule in group["rules"]
            if rule.get("record") == "drbert:setting:arm"
        }

    assert monitored_arms() == {"bert", "drbert"}
    assert monitored_arms(replicas=0) == {"bert"}
    assert monitored_arms(madeByRollout=True) == {"bert", "drbert"}
    deployments = arms(render({"arms": {"drbert": {"madeByRollout": True}}}))
    assert {arm: deployment["spec"]["replicas"] for arm, deployment in deployments.items()} == {
        "bert": 1,
        "drbert": 0,
    }
