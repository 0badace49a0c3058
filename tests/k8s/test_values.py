"""The chart refuses a value that it does not know, and values that contradict each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.k8s.helm import CHART, RenderError, Values, default_values, render
from tests.k8s.profiles import PROFILES, minors

Schema = dict[str, Any]
SCHEMA: Schema = json.loads((CHART / "values.schema.json").read_text())
BUSY: Values = {"settings": {"busy_wait": "anywhere"}}


def every_value(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield all keys that values may have, as a.b.c, with their schemas.

    `arms.*` stands for each arm.
    """
    for name, inner in schema.get("properties", {}).items():
        key = f"{path}.{name}".lstrip(".")
        if "$ref" in inner:  # an arm's own value, which is described where it is everybody's
            continue
        yield key, inner
        yield from every_value(inner, key)
    additional = schema.get("additionalProperties")
    if isinstance(additional, dict) and "properties" in additional:
        yield from every_value(additional, f"{path}.*")


def keys(values: Values, path: str = "") -> Iterator[str]:
    """Yield all keys of some values, as a.b.c."""
    for name, inner in values.items():
        key = f"{path}.{name}".lstrip(".")
        yield key
        if isinstance(inner, dict):
            yield from keys(inner, key)


def test_every_value_has_a_description_and_unknown_keys_are_refused() -> None:
    for key, schema in every_value(SCHEMA):
        assert re.fullmatch(r".{3,}\.", schema["description"]), (
            f"the description of {key} is not a sentence"
        )
        # A parent chart shares `global` with its other charts too.
        if "properties" in schema and key != "global":
            assert schema["additionalProperties"] is False, f"{key} accepts unknown keys"
    assert SCHEMA["additionalProperties"] is False


def test_every_value_has_its_default_in_values_yaml() -> None:
    defaults = set(keys(default_values()))
    for key, _ in every_value(SCHEMA):
        optional = key.startswith(("arms.", "settings.")) or key == "global"
        assert optional or key in defaults, f"values.yaml has no {key}"


def test_every_default_has_a_schema_or_belongs_to_kubernetes() -> None:
    known = {key for key, _ in every_value(SCHEMA)}
    for key in keys(yaml.safe_load((CHART / "values.yaml").read_text())):
        parent, _, _ = key.rpartition(".")
        assert (
            key in known
            or parent in ("arms", "arms.bert", "arms.drbert")
            or key.startswith("nodeSelector.")
            or parent.rpartition(".")[2] in ("requests", "limits", "labels")
        ), key


def test_every_value_is_used_by_a_template() -> None:
    templates = "\n".join(
        path.read_text() for path in (CHART / "templates").rglob("*") if path.is_file()
    )
    for key, _ in every_value(SCHEMA):
        if key == "global" or key.startswith("settings."):
            continue
        name = key.rpartition(".")[2]
        assert re.search(rf"[.\"]{name}\b", templates), f"no template reads {key}"


def test_a_profile_holds_only_values_that_differ_from_the_defaults() -> None:
    defaults = default_values()

    def repeated(values: Any, default: Any, path: str) -> Iterator[str]:
        if isinstance(values, dict) and isinstance(default, dict):
            for name in values.keys() & default.keys():
                yield from repeated(values[name], default[name], f"{path}.{name}")
        elif values == default:
            yield path

    for name, values in PROFILES.items():
        same = [path for path in repeated(values, defaults, name) if ".resources." not in path]
        assert not same, f"{same} are the defaults already"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replica": 2}, "replica"),
        ({"settings": {"max_wating": 5}}, "max_wating"),
        ({"settings": {"max_waiting": "many"}}, "/settings/max_waiting"),
        ({"settings": {"max_waiting": 0}}, "/settings/max_waiting"),
        ({"settings": {"max_batch_size": 256}}, "/settings/max_batch_size"),
        ({"settings": {"api_keys_file": "/keys"}}, "api_keys_file"),
        ({"settings": {"runtime": "tensorflow"}}, "/settings/runtime"),
        ({"arms": {"Bert": {"role": "candidate"}}}, "invalid propertyName 'Bert'"),
        ({"arms": {"bert-pods": {"role": "candidate"}}}, "invalid propertyName 'bert-pods'"),
        ({"arms": {"electra": {}}}, "role"),
        ({"arms": {"electra": {"role": "canary"}}}, "role"),
        ({"arms": {"bert": {"artefact": "/models/bert"}}}, "artefact"),
        ({"arms": {"bert": {"artifact": "models/bert"}}}, "artifact"),
        ({"arms": {"bert": None, "drbert": None}}, "/arms"),
        ({"image": {"tag": "latest"}}, "/image/tag"),
        ({"image": {"digest": "abc"}}, "/image/digest"),
        ({"model": {"source": "hub"}}, "/model/source"),
        ({"model": {"digest": "sha256:abc"}}, "/model/digest"),
        ({"gpu": {"count": 0.5}}, "/gpu/count"),
        ({"gpu": {"resourceName": "gpu"}}, "/gpu/resourceName"),
        ({"resources": {"request": {"cpu": 1}}}, "request"),
        ({"resources": {"requests": {"cpus": 1}}}, "invalid propertyName 'cpus'"),
        ({"shutdown": {"graceSeconds": "60s"}}, "/shutdown/graceSeconds"),
        ({"monitoring": {"rules": {"margin": 0}}}, "/monitoring/rules/margin"),
        (
            {"monitoring": {"serviceMonitor": {"interval": "15 sec"}}},
            "/monitoring/serviceMonitor/interval",
        ),
        ({"podDisruptionBudget": {"minAvailable": 1}}, "minAvailable"),
        ({"proof": {"restarts": 6}}, "/proof/restarts"),
        ({"admin": {"port": 8000}}, "/admin/port"),
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_the_schema_is_refused_by_name(
    values: Values, words: str
) -> None:
    with pytest.raises(RenderError, match=re.escape(words)):
        render(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"shutdown": {"graceSeconds": 34}},
            (
                "graceSeconds is 34, and a pod that goes away needs 35: 5 of preStopSeconds, 20 of"
                " settings.drain_timeout_s and 10 to end"
            ),
        ),
        (
            {"shutdown": {"graceSeconds": 60}, "settings": {"drain_timeout_s": 45.5}},
            "graceSeconds is 60, and a pod that goes away needs 61",
        ),
        (
            {
                "autoscaling": {
                    "hpa": {"enabled": True},
                    "keda": {"enabled": True, "serverAddress": "http://p"},
                }
            },
            "both enabled, and would fight over the replicas; choose one",
        ),
        ({"autoscaling": {"keda": {"enabled": True}}}, "give autoscaling.keda.serverAddress"),
        (
            {"autoscaling": {"minReplicas": 11}},
            "minReplicas (11) is above autoscaling.maxReplicas (10)",
        ),
        ({"arms": {"drbert": {"role": "reference"}}}, "arms bert and drbert are all references"),
        ({"model": {"source": "pvc"}}, "give model.pvc.claimName"),
        ({"model": {"source": "initContainer"}}, "give model.initContainer.image"),
        (
            {"model": {"source": "initContainer", "initContainer": {"image": "a:1"}}},
            "name the store in networkPolicy.egress",
        ),
        ({"model": {"source": "imageVolume"}}, "give model.imageVolume.reference"),
        ({"admin": {"enabled": True}}, "give admin.existingSecret"),
        ({"settings": {"metrics": "admin"}}, "set admin.enabled"),
        (
            {"admin": {"enabled": True, "existingSecret": "a"}},
            "name who may in networkPolicy.admins",
        ),
        (
            {"admin": {"enabled": True, "existingSecret": "a"}, "settings": {"metrics": "admin"}},
            "or in networkPolicy.monitoring where settings.metrics is admin",
        ),
        (
            {"env": [{"name": "DRBERT_DRAIN_TIMEOUT_S", "value": "120"}]},
            "give settings.drain_timeout_s",
        ),
        (
            {"env": [{"name": "DRBERT_MAX_QUEUE_SIZE", "value": "512"}]},
            "give settings.max_waiting",
        ),
        (
            {"model": {"digest": "0" * 64}},
            "arms bert and drbert read several; give each its own as arms.NAME.model.digest",
        ),
        ({"ingress": {"enabled": True}}, "give ingress.hosts"),
        (
            {"ingress": {"enabled": True, "hosts": ["a.example"]}, "tls": {"existingSecret": "t"}},
            "end TLS at the Ingress",
        ),
        (
            {"ingress": {"enabled": True, "hosts": ["a.example"]}, **BUSY},
            "brings strangers; leave it out",
        ),
        ({"settings": {"tracing": True}}, "name the collector in networkPolicy.egress"),
        ({"httpRoute": {"enabled": True}}, "name it in httpRoute.parentRefs"),
        (
            {
                "httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}]},
                "tls": {"existingSecret": "t"},
            },
            "end TLS at the Gateway",
        ),
        ({"rollout": {"maxSurge": 0}}, "no rollout could begin"),
        (
            {
                "monitoring": {"serviceMonitor": {"enabled": True}},
                "networkPolicy": {"clients": [{"podSelector": {}}]},
            },
            "name Prometheus in networkPolicy.monitoring",
        ),
        (
            {
                "monitoring": {"serviceMonitor": {"enabled": True}},
                "settings": {"metrics": "admin"},
                "admin": {"enabled": True, "existingSecret": "a"},
                "networkPolicy": {"admins": [{"podSelector": {}}]},
            },
            "name Prometheus in networkPolicy.monitoring",
        ),
        (
            {
                "proof": {"enabled": True},
                **BUSY,
                "replicas": 16,
                "apiKeys": {"existingSecret": "keys"},
            },
            "asks pods that want a key; give proof.headersSecret",
        ),
        (
            {"proof": {"enabled": True}, "replicas": 16},
            "set settings.busy_wait: anywhere, or proof.delayBy: client",
        ),
        ({"proof": {"enabled": True}, **BUSY}, "arm bert has 1 pods; give it 16"),
        (
            {"proof": {"enabled": True}, **BUSY, "replicas": 16, "tls": {"existingSecret": "t"}},
            "asks pods by their addresses, which no certificate names",
        ),
        (
            {
                "proof": {"enabled": True},
                **BUSY,
                "replicas": 16,
                "arms": {"electra": {"role": "candidate"}},
            },
            "2 arms are a candidate; name one in proof.candidate",
        ),
        (
            {
                "proof": {"enabled": True},
                **BUSY,
                "replicas": 16,
                "arms": {"bert": {"role": "candidate"}},
            },
            "0 arms are a reference; give one arm that role",
        ),
    ],
    ids=str,
)
def test_values_that_contradict_each_other_are_refused_with_the_remedy(
    values: Values, words: str
) -> None:
    with pytest.raises(RenderError, match=re.escape(words)):
        render(values)


def test_a_long_grace_period_and_a_named_candidate_are_accepted() -> None:
    assert render({"shutdown": {"graceSeconds": 35}})
    same = {"bert": {"artifact": "/models/one"}, "drbert": {"artifact": "/models/one"}}
    assert render({"model": {"digest": "0" * 64}, "arms": same})
    assert render(
        {
            "proof": {"enabled": True, "candidate": "electra"},
            **BUSY,
            "replicas": 16,
            "arms": {"electra": {"role": "candidate"}},
        }
    )


def test_an_arm_that_is_null_is_removed() -> None:
    names = [
        document["metadata"]["name"]
        for document in render({"arms": {"drbert": None}})
        if document["kind"] == "Deployment"
    ]
    assert names == ["demo-bert"]


def test_the_chart_requires_the_oldest_kubernetes_that_it_is_tested_on() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">=1.{minors('default').start}.0-0"
