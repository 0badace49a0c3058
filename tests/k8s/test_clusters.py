"""What real clusters showed: each test is of a release that failed on one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.k8s import helm
from tests.k8s.helm import RenderError, default_values, render
from tests.k8s.profiles import FEATURES, PROFILES, containers, of_kind, pod_specs
from tests.k8s.test_invariants import arms, drbert
from tests.requirements import package_index

MONITORED: dict[str, Any] = {
    "monitoring": {"rules": {"enabled": True}, "dashboards": {"enabled": True}}
}


def test_who_scales_by_hand_owns_the_number_of_pods_if_the_chart_sets_none() -> None:
    for deployment in arms(render({"manageReplicas": False})).values():
        assert "replicas" not in deployment["spec"]


def test_a_model_is_replaced_in_one_pod_so_no_balanced_service_has_the_admin_port() -> None:
    documents = render(
        {
            "admin": {"enabled": True, "existingSecret": "admins"},
            "networkPolicy": {"admins": [{"podSelector": {}}]},
        }
    )
    offering = [
        service
        for service in of_kind(documents, "Service")
        if any(port["name"] == "admin" for port in service["spec"]["ports"])
    ]
    assert [service["metadata"]["name"] for service in offering] == [
        "demo-bert-admin",
        "demo-drbert-admin",
    ]
    assert {service["spec"]["clusterIP"] for service in offering} == {"None"}


def test_pods_listen_on_both_families_and_connections_end_after_a_while() -> None:
    container = drbert(arms(render({}))["bert"])
    assert container["args"][1:3] == ["--host", "::"]
    assert {"name": "DRBERT_MAX_CONNECTION_AGE_S", "value": "300"} in container["env"]
    forever = drbert(arms(render({"settings": {"max_connection_age_s": 0}}))["bert"])
    assert {"name": "DRBERT_MAX_CONNECTION_AGE_S", "value": "0"} in forever["env"]


def test_the_ids_of_pods_can_be_left_to_the_cluster() -> None:
    for _, spec in pod_specs(render({"security": {"setIds": False}})):
        assert set(spec["securityContext"]) == {"runAsNonRoot", "seccompProfile"}


def test_a_parent_chart_can_take_the_example_arms_away() -> None:
    documents = render(
        {
            "arms": {
                "bert": {"enabled": False},
                "drbert": {"enabled": False},
                "reviews": {"role": "reference"},
            }
        }
    )
    assert list(arms(documents)) == ["reviews"]
    assert {s["metadata"]["name"] for s in of_kind(documents, "Service")} == {
        "demo",
        "demo-reviews",
    }


@pytest.mark.parametrize(
    "values",
    [{"arms": {"bert": {"enabled": False}, "drbert": {"enabled": False}}}, {"arms": None}],
)
def test_a_release_without_an_arm_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RenderError, match="arm"):
        render(values)


def test_a_parent_chart_names_the_registry_and_its_secrets_for_all_charts() -> None:
    documents = render(
        {
            "global": {"imageRegistry": "registry.example", "imagePullSecrets": ["shared"]},
            "imagePullSecrets": [{"name": "own"}],
        }
    )
    for _, spec in pod_specs(documents):
        assert spec["imagePullSecrets"] == [{"name": "own"}, {"name": "shared"}]
        for container in containers(spec):
            assert container["image"].startswith("registry.example/drbert-serve:")
    elsewhere = render(
        {
            "global": {"imageRegistry": "registry.example"},
            "image": {"repository": "ghcr.example/me/drbert-serve"},
        }
    )
    for _, spec in pod_specs(elsewhere):
        for container in containers(spec):
            assert container["image"].startswith("ghcr.example/me/drbert-serve:")


def test_dashboards_of_two_releases_share_neither_file_nor_uid_nor_title() -> None:
    shown = []
    for name in ("team-a", "team-b"):
        [config] = of_kind(render(MONITORED, name=name), "ConfigMap")
        [(file, text)] = config["data"].items()
        dashboard = json.loads(text)
        shown.append((file, dashboard["uid"], dashboard["title"]))
        assert len(dashboard["uid"]) <= 40
        chosen = {each["name"]: each.get("current") for each in dashboard["templating"]["list"]}
        assert chosen["namespace"]["value"] == "prod"
        assert chosen["release"]["value"] == name
    assert all(first != second for first, second in zip(*shown, strict=True)), shown


def test_the_rules_of_a_release_read_its_own_series_only() -> None:
    [rules] = of_kind(render(MONITORED, name="team-a"), "PrometheusRule")
    own = 'namespace="prod",release="team-a"'
    for group in rules["spec"]["groups"]:
        for rule in group["rules"]:
            for series in re.findall(r"\bdrbert[_:][\w:]+(?:\{[^}]*\})?", rule["expr"]):
                assert f"{{{own}" in series, (rule, series)


def test_an_arm_can_have_values_of_its_own() -> None:
    deployments = arms(
        render(
            {
                "settings": {"max_texts": 64},
                "nodeSelector": {"disk": "ssd"},
                "arms": {
                    "drbert": {
                        "settings": {"threads": 2},
                        "resources": {"limits": {"memory": "4Gi"}},
                        "nodeSelector": {"zone": "a"},
                        "variant": "cpu-fp32",
                        "env": [{"name": "OTEL_SERVICE_NAME", "value": "drbert"}],
                        "podLabels": {"tier": "canary"},
                    }
                },
            }
        )
    )
    bert, own = (deployments[name]["spec"]["template"] for name in ("bert", "drbert"))
    container = drbert(deployments["drbert"])
    names = {each["name"]: each["value"] for each in container["env"]}
    assert names["DRBERT_MAX_TEXTS"] == "64"
    assert names["DRBERT_THREADS"] == "2"
    assert names["OTEL_SERVICE_NAME"] == "drbert"
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "4Gi"}
    assert container["args"][-2:] == ["--variant", "cpu-fp32"]
    assert own["spec"]["nodeSelector"] == {"kubernetes.io/os": "linux", "disk": "ssd", "zone": "a"}
    assert own["metadata"]["labels"]["tier"] == "canary"
    assert "tier" not in bert["metadata"]["labels"]
    assert "--variant" not in drbert(deployments["bert"])["args"]


@pytest.mark.parametrize("setting", ["busy_wait", "max_waiting", "metrics", "tracing"])
def test_what_decides_who_reaches_an_arm_is_the_same_for_all(setting: str) -> None:
    with pytest.raises(RenderError):
        render({"arms": {"drbert": {"settings": {setting: "anywhere"}}}})


def test_arms_scale_between_numbers_of_their_own() -> None:
    values = {
        "autoscaling": {"minReplicas": 3, "hpa": {"enabled": True}},
        "arms": {"drbert": {"autoscaling": {"minReplicas": 1, "maxReplicas": 4}}},
    }
    ranges = {
        each["metadata"]["name"]: (each["spec"]["minReplicas"], each["spec"]["maxReplicas"])
        for each in of_kind(render(values), "HorizontalPodAutoscaler")
    }
    assert ranges == {"demo-bert": (3, 10), "demo-drbert": (1, 4)}
    with pytest.raises(RenderError, match="of arm drbert"):
        render({**values, "arms": {"drbert": {"autoscaling": {"minReplicas": 99}}}})


def test_an_autoscaler_needs_no_adapter_if_it_reads_processor_time() -> None:
    values = {"autoscaling": {"hpa": {"enabled": True, "cpuUtilization": 50}}}
    for each in of_kind(render(values), "HorizontalPodAutoscaler"):
        [metric] = each["spec"]["metrics"]
        assert metric["containerResource"]["container"] == "drbert"
        assert metric["containerResource"]["target"]["averageUtilization"] == 50


def test_an_ingress_may_speak_https_to_the_arms_if_its_annotation_says_so() -> None:
    tls: dict[str, Any] = {
        "tls": {"existingSecret": "certificate"},
        "ingress": {"enabled": True, "hosts": ["a.example"]},
    }
    with pytest.raises(RenderError, match="unless an annotation asks for https"):
        render(tls)
    other = {"alb.ingress.kubernetes.io/listen-ports": '[{"HTTPS": 443}]'}
    with pytest.raises(RenderError, match="unless an annotation asks for https"):
        render({**tls, "ingress": {**tls["ingress"], "annotations": other}})
    annotation = {"nginx.ingress.kubernetes.io/backend-protocol": "HTTPS"}
    assert of_kind(
        render({**tls, "ingress": {**tls["ingress"], "annotations": annotation}}), "Ingress"
    )


def test_a_gateway_may_speak_https_to_the_arms() -> None:
    values = FEATURES["https-behind-a-gateway"]
    [policy] = of_kind(render(values), "BackendTLSPolicy")
    assert policy["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert policy["spec"] == {
        "targetRefs": [
            {"group": "", "kind": "Service", "name": f"demo-{arm}"} for arm in ("bert", "drbert")
        ],
        "validation": {"hostname": "drbert.internal", "wellKnownCACertificates": "System"},
    }
    route = values["httpRoute"]
    with pytest.raises(RenderError, match=r"set httpRoute\.backendTls"):
        render({**values, "httpRoute": {**route, "backendTls": {"enabled": False}}})
    with pytest.raises(RenderError, match=r"give tls\.existingSecret"):
        render({"httpRoute": route})


def test_a_newer_chart_that_changes_nothing_of_a_pod_leaves_it_alone() -> None:
    for document, _ in pod_specs(render(PROFILES["ab-proof"])):
        template = document if document["kind"] == "Pod" else document["spec"]["template"]
        labels = template["metadata"]["labels"]
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(labels)


NULLED = [
    "arms",
    "image",
    "model",
    "service",
    "security",
    "autoscaling",
    "replicas",
    "monitoring.rules",
    "autoscaling.hpa",
    "proof.evidence",
    "shutdown.preStopSeconds",
    "model.loadTimeoutSeconds",
    "security.setIds",
    "tls.existingSecret",
]


@pytest.mark.parametrize("key", NULLED)
def test_a_value_that_is_missing_is_named(key: str) -> None:
    values: Any = None
    for name in reversed(key.split(".")):
        values = {name: values}
    with pytest.raises(RenderError, match=rf"missing propert.*{key.rpartition('.')[2]}"):
        render(values)


def test_a_pod_with_a_gpu_keeps_the_limits_of_its_processors_and_memory() -> None:
    plain, with_gpu = (
        drbert(arms(render({"gpu": {"enabled": enabled}}))["bert"])["resources"]
        for enabled in (False, True)
    )
    assert plain["requests"] != plain["limits"]
    for kind in ("requests", "limits"):
        assert with_gpu[kind] == plain[kind] | {"nvidia.com/gpu": 1}
    runtime = {"gpu": {"runtimeClassName": "nvidia"}}
    for _, spec in pod_specs(render(runtime)):
        assert "runtimeClassName" not in spec


def test_an_arms_own_tag_or_repository_is_not_held_by_the_digest_of_all() -> None:
    digest = f"sha256:{'a' * 64}"
    for image, expected in (
        ({"tag": "0.2.0"}, "drbert-serve:0.2.0"),
        ({"repository": "mine"}, "mine:"),
        ({"digest": f"sha256:{'b' * 64}"}, f"drbert-serve@sha256:{'b' * 64}"),
        ({"pullPolicy": "Always"}, f"drbert-serve@{digest}"),
    ):
        documents = arms(
            render({"image": {"digest": digest}, "arms": {"drbert": {"image": image}}})
        )
        assert drbert(documents["drbert"])["image"].startswith(expected)
        assert drbert(documents["bert"])["image"] == f"drbert-serve@{digest}"


def test_a_parked_arm_gets_no_requests_and_is_not_tested() -> None:
    route = {"enabled": True, "parentRefs": [{"name": "public"}]}
    values: dict[str, Any] = {"httpRoute": route, "arms": {"drbert": {"replicas": 0, "weight": 5}}}
    documents = render(values)
    [shares] = of_kind(documents, "HTTPRoute")
    weights = {each["name"]: each["weight"] for each in shares["spec"]["rules"][0]["backendRefs"]}
    assert weights == {"demo-bert": 1, "demo-drbert": 0}
    [test] = of_kind(documents, "Pod")
    assert test["spec"]["containers"][0]["args"] == ["http://demo-bert:8000"]
    # Somebody else gives it pods: an autoscaler, a Rollout, or kubectl scale.
    for others in (
        {"autoscaling": {"hpa": {"enabled": True}}},
        {"manageReplicas": False},
        {"arms": {"drbert": {"replicas": 0, "weight": 5, "madeByRollout": True}}},
    ):
        [shares] = of_kind(render(values | others), "HTTPRoute")
        assert [each["weight"] for each in shares["spec"]["rules"][0]["backendRefs"]] == [1, 5]
    assert not of_kind(render({"replicas": 0}), "Pod")


def test_the_test_pod_has_an_image_of_the_arms() -> None:
    own = {name: {"image": {"repository": f"{name}-image"}} for name in ("bert", "drbert")}
    [test] = of_kind(render({"arms": own}), "Pod")
    assert test["spec"]["containers"][0]["image"].startswith("bert-image:")


def test_names_that_yaml_takes_for_something_else_stay_text() -> None:
    values = {
        "arms": {
            "bert": {"enabled": False},
            "drbert": {"enabled": False},
            "on": {"role": "reference"},
        },
        "nameOverride": "demo",
    }
    for document in render(values, name="12345"):
        labels = document["metadata"]["labels"]
        assert all(isinstance(value, str) for value in labels.values())
    with pytest.raises(RenderError, match="begin with a letter, and release 12345 does not"):
        render({}, name="12345")


def test_a_rollout_that_could_not_begin_is_refused_in_percent_too() -> None:
    with pytest.raises(RenderError, match="are both 0"):
        render({"rollout": {"maxSurge": "0%", "maxUnavailable": 0}})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"arms": {"bert-again": {"role": "candidate"}}}, "bert-again"),
        ({"extraVolumes": [{"name": "tmp"}]}, "extraVolumes"),
        ({"lifecycle": {"stopSignal": "SIGINT"}}, "stopSignal"),
    ],
)
def test_what_the_api_server_would_refuse_is_refused_earlier(
    values: dict[str, Any], words: str
) -> None:
    with pytest.raises(RenderError, match=words):
        render(values)


def test_a_handler_of_the_values_takes_the_place_of_the_charts_own() -> None:
    values: dict[str, Any] = {"lifecycle": {"preStop": {"exec": {"command": ["leave"]}}}}
    with pytest.raises(RenderError, match=r"give shutdown\.graceSeconds"):
        render(values)
    values["shutdown"] = {"graceSeconds": 60}
    assert drbert(arms(render(values))["bert"])["lifecycle"] == values["lifecycle"]
    longer = arms(render({"lifecycle": {"preStop": {"sleep": {"seconds": 60}}}}))["bert"]
    assert longer["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 60 + 20 + 10
    own = drbert(arms(render({}))["bert"])["lifecycle"]
    assert own == {"preStop": {"sleep": {"seconds": 5}}}
    older = drbert(arms(render({}, kubernetes="1.29"))["bert"])["lifecycle"]
    assert older == {"preStop": {"exec": {"command": ["sleep", "5"]}}}


def test_a_release_may_have_dots_in_its_name() -> None:
    names = {each["metadata"]["name"] for each in of_kind(render({}, name="my.app"), "Service")}
    assert names == {"my-app", "my-app-bert", "my-app-drbert"}


@pytest.mark.parametrize("key", ["commonLabels", "podLabels", "helperLabels"])
def test_no_label_takes_the_place_of_one_that_selects_pods(key: str) -> None:
    with pytest.raises(RenderError, match="arm"):
        render({key: {"arm": "x"}})


def test_an_arm_whose_pods_a_rollout_makes_has_no_autoscaler_of_its_own() -> None:
    values = {
        "autoscaling": {"hpa": {"enabled": True}},
        "arms": {"drbert": {"madeByRollout": True}},
    }
    scaled = of_kind(render(values), "HorizontalPodAutoscaler")
    assert [each["metadata"]["name"] for each in scaled] == ["demo-bert"]


def test_a_proof_keeps_its_connections() -> None:
    profile = PROFILES["ab-proof"]
    settings = {**profile.get("settings", {}), "max_connection_requests": 1_000}
    for deployment in arms(render({**profile, "settings": settings})).values():
        names = {each["name"] for each in drbert(deployment)["env"]}
        assert not any(name.startswith("DRBERT_MAX_CONNECTION") for name in names)


def test_an_autoscaler_holds_pods_at_half_of_their_capacity() -> None:
    """As in the sizing rule; the simulation has how many requests are in flight then."""
    [half] = re.findall(r"^\| 50% \|.* ([\d.]+) \|$", Path("benchmarks/fleet.md").read_text(), re.M)
    assert default_values()["autoscaling"]["inflightPerPod"] == round(float(half))
    assert "× processors of a pod × 0.5)" in Path("k8s/README.md").read_text()


def test_the_values_for_fifty_thousand_classifications_a_second_render() -> None:
    text = Path("k8s/README.md").read_text().partition("**50,000 classifications a second**")[2]
    [values] = re.findall(r"\A.*?^```yaml\n(.*?)^```", text, re.M | re.S)
    documents = render(yaml.safe_load(values))
    assert list(arms(documents)) == ["reviews"]
    kinds = {document["kind"] for document in documents}
    assert {"HTTPRoute", "ScaledObject", "ServiceMonitor", "PodDisruptionBudget"} <= kinds


def test_pods_of_the_test_run_where_the_arms_run() -> None:
    documents = render(
        {
            "nodeSelector": {"arch": "amd64"},
            "tolerations": [{"key": "pool", "operator": "Exists"}],
            "gpu": {"enabled": True},
            "priorityClassName": "high",
            "helperLabels": {"sidecar.istio.io/inject": "false"},
        }
    )
    [test] = of_kind(documents, "Pod")
    assert test["spec"]["nodeSelector"] == {"kubernetes.io/os": "linux", "arch": "amd64"}
    assert [each["key"] for each in test["spec"]["tolerations"]] == ["pool", "nvidia.com/gpu"]
    assert test["spec"]["priorityClassName"] == "high"
    assert test["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
    for container in test["spec"]["containers"]:
        assert container["resources"]["limits"].keys() == {"cpu", "memory"}


def test_the_runtime_for_kserve_is_a_pod_that_kubernetes_accepts() -> None:
    runtime, service = yaml.safe_load_all(Path("k8s/examples/kserve.yaml").read_text())
    spec = runtime["spec"]
    assert set(spec) == {
        "supportedModelFormats",
        "protocolVersions",
        "multiModel",
        "containers",
        "volumes",
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "drbert"},
        "spec": {"containers": spec["containers"], "volumes": spec["volumes"]},
    }
    kubernetes_validate.validate(pod, helm.KUBERNETES, strict=True)
    [container] = spec["containers"]
    assert container["name"] == "kserve-container"
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]


def test_trying_the_chart_on_a_cluster_ends_well_where_there_is_none(tmp_path: Path) -> None:
    shell = shutil.which("sh")
    assert shell is not None
    done = subprocess.run(
        [shell, "k8s/cluster.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "skipped: docker is not installed\n"


@package_index
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_package_of_the_image_exists_for_its_processor(machine: str, tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    listed = subprocess.run(
        [sys.executable, "k8s/requirements.py", ""], capture_output=True, text=True, check=True
    )
    requirements.write_text(listed.stdout)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"),
            *("--no-deps", "--only-binary", ":all:", "--target", str(tmp_path / "app")),
            *("--python-version", "3.11", "--implementation", "cp"),
            *("--platform", f"manylinux_2_36_{machine}", "--platform", f"manylinux_2_35_{machine}"),
            *("--platform", f"manylinux_2_28_{machine}", "--platform", f"manylinux_2_17_{machine}"),
            *("--platform", f"manylinux2014_{machine}", "--requirement", str(requirements)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_what_the_image_leaves_out_may_be_missing_from_a_wheel() -> None:
    """OpenVINO's wheel for arm64 has no GPU plug-in and no cache of it."""
    removals = re.findall(r"&& (rm [^\n]*openvino[^\n]*)", Path("Dockerfile").read_text())
    assert removals
    assert all(command.startswith("rm -rf ") for command in removals), removals
