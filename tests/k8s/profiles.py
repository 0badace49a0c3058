"""
The values that the chart is tested with: its profiles, and one set for each feature that no profile
uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.helm import Document

Values = Mapping[str, Any]

PROFILES: dict[str, Values] = {"default": {}} | {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted(Path("k8s/values").glob("*.yaml"))
}

DIGEST = "0123456789abcdef" * 4
OPEN: list[Values] = [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]

FEATURES: dict[str, Values] = {
    "hpa": {"autoscaling": {"hpa": {"enabled": True}}},
    "secrets": {
        "apiKeys": {"existingSecret": "keys"},
        "tls": {"existingSecret": "certificate"},
        "admin": {"enabled": True, "existingSecret": "admins"},
        "settings": {"metrics": "admin"},
        "monitoring": {"serviceMonitor": {"enabled": True}},
        "networkPolicy": {
            "monitoring": [{"namespaceSelector": {}}],
            "admins": [{"podSelector": {"matchLabels": {"app": "releaser"}}}],
        },
    },
    "tls-metrics": {
        "tls": {"existingSecret": "certificate"},
        "monitoring": {"serviceMonitor": {"enabled": True, "labels": {"team": "nlp"}}},
    },
    "init-container": {
        "model": {
            "source": "initContainer",
            "initContainer": {
                "image": "store.example/fetch:1",
                "command": ["fetch"],
                "args": ["reviews-4", "/models"],
                "env": [{"name": "REGION", "value": "eu"}],
                "envFrom": [{"secretRef": {"name": "store"}}],
            },
        },
        "arms": {"bert": {"model": {"digest": DIGEST}}, "drbert": {"model": {"digest": DIGEST}}},
        "networkPolicy": {"egress": OPEN},
    },
    "volumes": {
        "arms": {
            "bert": {
                "model": {
                    "source": "pvc",
                    "pvc": {"claimName": "models", "subPath": "bert"},
                    "digest": DIGEST,
                },
                "artifact": "/models/v3",
            },
            "drbert": {
                "image": {"tag": "0.2.0", "pullPolicy": "Always"},
                "modelName": "reviews",
                "model": {"digest": DIGEST},
                "replicas": 2,
            },
            "drbert-large": {"role": "candidate", "image": {"digest": f"sha256:{DIGEST}"}},
        },
    },
    "mig": {
        "gpu": {
            "enabled": True,
            "resourceName": "nvidia.com/mig-1g.10gb",
            "runtimeClassName": "nvidia",
        },
        "security": {"readOnlyRootFilesystem": False},
    },
    "ingress": {
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "hosts": ["classify.example"],
            "tlsSecret": "classify-tls",
            "annotations": {"a": "b"},
        },
        "service": {"annotations": {"c": "d"}, "port": 80},
    },
    "proof-by-client": {
        "replicas": 16,
        "proof": {
            "enabled": True,
            "delayBy": "client",
            "headersSecret": "keys",
            "capacityPerSecond": 120.5,
            "pilot": '{"restarts": 12}\n',
            "texts": "good film\nbad film",
            "evidence": {"existingClaim": "evidence", "storageClassName": ""},
        },
    },
    "tracing": {
        "settings": {
            "tracing": True,
            "max_body_bytes": 4_194_304,
            "request_timeout_s": 2.5,
            "cors_origins": "https://a.example",
        },
        "env": [
            {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector.monitoring:4318"}
        ],
        "networkPolicy": {"egress": OPEN},
    },
    "hpa-by-processor": {"autoscaling": {"hpa": {"enabled": True, "cpuUtilization": 50}}},
    "openshift": {
        "security": {"setIds": False},
        "service": {"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6", "IPv4"]},
        "manageReplicas": False,
    },
    "private-authority": {
        "extraVolumes": [{"name": "authority", "configMap": {"name": "authority"}}],
        "extraVolumeMounts": [{"name": "authority", "mountPath": "/etc/authority"}],
        "extraContainers": [
            {
                "name": "proxy",
                "image": "proxy.example/proxy:1",
                "resources": {
                    "requests": {"cpu": "100m", "memory": "64Mi"},
                    "limits": {"memory": "64Mi"},
                },
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
        "extraEnvFrom": [{"secretRef": {"name": "store"}}],
        "hostAliases": [{"ip": "10.0.0.7", "hostnames": ["store.example"]}],
        "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]},
        "revisionHistoryLimit": 3,
        "commonLabels": {"owner": "nlp"},
        "helperLabels": {"sidecar.istio.io/inject": "false"},
    },
    "https-behind-a-gateway": {
        "tls": {"existingSecret": "certificate"},
        "httpRoute": {
            "enabled": True,
            "parentRefs": [{"name": "public"}],
            "backendTls": {"enabled": True, "hostname": "drbert.internal"},
        },
    },
    "elsewhere": {
        "imagePullSecrets": [{"name": "registry"}],
        "podLabels": {"team": "nlp"},
        "podAnnotations": {"a": "b"},
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"operator": "Exists"}],
        "priorityClassName": "high",
        "affinity": {"nodeAffinity": {}},
        "serviceAccount": {"create": False},
        "networkPolicy": {"enabled": False},
        "shutdown": {"preStopSeconds": 0, "graceSeconds": 60},
    },
}

EVERYTHING = PROFILES | FEATURES

# The first minor version of Kubernetes that can mount an image, and the profiles that do.
IMAGE_VOLUMES_SINCE = 31
WITH_IMAGE_VOLUMES = {"production"}


def minors(name: str) -> range:
    """Return the minor versions N of Kubernetes 1.N for which some values are rendered."""
    return range(IMAGE_VOLUMES_SINCE if name in WITH_IMAGE_VOLUMES else 28, 38)


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    """Return the objects of some kinds."""
    return [document for document in documents if document["kind"] in kinds]


def pod_specs(documents: list[Document]) -> Iterator[tuple[Document, Document]]:
    """Yield each object that creates pods, with the spec of its pods."""
    for document in of_kind(documents, "Deployment", "Job"):
        yield document, document["spec"]["template"]["spec"]
    for document in of_kind(documents, "Pod"):
        yield document, document["spec"]


def containers(spec: Document) -> list[Document]:
    """Return the containers of a pod, its init containers first."""
    return [*spec.get("initContainers", []), *spec["containers"]]
