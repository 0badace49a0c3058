"""Values are held against what the chart knows: a misspelt one is refused, not ignored."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.k8s.helm import CHART, Refused, Values, default_values, render
from tests.k8s.profiles import PROFILES, minors

Schema = dict[str, Any]
SCHEMA: Schema = json.loads((CHART / "values.schema.json").read_text())
BUSY: Values = {"settings": {"busy_wait": "anywhere"}}


def every_value(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """All keys that values may have, as a.b.c; `arms.*` stands for each arm."""
    for name, inner in schema.get("properties", {}).items():
        where = f"{path}.{name}".lstrip(".")
        yield where, inner
        yield from every_value(inner, where)
    if (
        isinstance(schema.get("additionalProperties"), dict)
        and "properties" in schema["additionalProperties"]
    ):
        yield from every_value(schema["additionalProperties"], f"{path}.*")


def keys(values: Values, path: str = "") -> Iterator[str]:
    for name, inner in values.items():
        where = f"{path}.{name}".lstrip(".")
        yield where
        if isinstance(inner, dict):
            yield from keys(inner, where)


def test_every_value_is_described_and_no_level_of_ours_takes_unknown_keys() -> None:
    for where, schema in every_value(SCHEMA):
        assert re.fullmatch(r".{3,}\.", schema["description"]), (
            f"{where} is not described by a sentence"
        )
        if "properties" in schema:
            assert schema["additionalProperties"] is False, f"{where} takes misspelt keys"
    assert SCHEMA["additionalProperties"] is False


def test_every_value_has_its_default_in_values_yaml() -> None:
    defaults = set(keys(default_values()))
    for where, _ in every_value(SCHEMA):
        optional = where.startswith(("arms.", "settings.")) or where == "global"
        assert optional or where in defaults, f"values.yaml says nothing of {where}"


def test_every_default_is_commented_or_says_all_by_its_name() -> None:
    known = {where for where, _ in every_value(SCHEMA)}
    for where in keys(yaml.safe_load((CHART / "values.yaml").read_text())):
        parent, _, _ = where.rpartition(".")
        assert (
            where in known
            or parent in ("arms", "arms.bert", "arms.drbert")
            or parent.rpartition(".")[2] in ("requests", "limits", "labels")
        ), where


def test_every_value_is_used_by_a_template() -> None:
    templates = "\n".join(
        path.read_text() for path in (CHART / "templates").rglob("*") if path.is_file()
    )
    for where, _ in every_value(SCHEMA):
        if where == "global" or where.startswith("settings."):
            continue
        name = where.rpartition(".")[2]
        assert re.search(rf"\.{name}\b", templates), f"no template reads {where}"


def test_a_profile_says_only_what_differs() -> None:
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
def test_what_the_schema_does_not_know_is_refused_by_name(values: Values, words: str) -> None:
    with pytest.raises(Refused, match=re.escape(words)):
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
def test_what_makes_no_sense_together_is_refused_with_the_remedy(
    values: Values, words: str
) -> None:
    with pytest.raises(Refused, match=re.escape(words)):
        render(values)


def test_enough_grace_and_chosen_candidates_are_taken() -> None:
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


def test_an_arm_goes_when_it_is_null() -> None:
    names = [
        document["metadata"]["name"]
        for document in render({"arms": {"drbert": None}})
        if document["kind"] == "Deployment"
    ]
    assert names == ["demo-bert"]


def test_the_chart_asks_for_the_oldest_kubernetes_that_it_is_tried_on() -> None:
    told = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert told["kubeVersion"] == f">=1.{minors('default').start}.0-0"
