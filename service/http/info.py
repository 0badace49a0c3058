"""
The answer of GET /info: what is loaded, how, and under which limits.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from dataclasses import asdict
from typing import Any

from service.artifact import Manifest
from service.host import gpus
from service.http.dialects.rerank import is_reranker
from service.registry import LoadedModel
from service.requests.zero_shot import knows_entailment
from service.state import ServiceState

ENGINES = ("openvino", "onnxruntime", "onnxruntime-gpu")
"""Packages of engines."""


def service_info(service: ServiceState) -> dict[str, Any]:
    """Return what GET /info answers.

    Renamed settings have both their former and their new key, and renamed fields of the manifest
    keep their former key: callers rely on these.
    """
    registry, limits = service.registry, service.batcher.limits
    return {
        "service": "drbert-serve",
        "version": service.version,
        "instance_id": service.instance_id,
        "started": service.started,
        "state": service.lifecycle.state,
        "engines": engine_versions(),
        "threads": service.threads,
        "gpus": [gpu.to_dict() for gpu in gpus.visible()],
        "settings": service.settings.to_dict(),
        "batching": {
            "max_batch_size": limits.size,
            "max_batch_tokens": limits.tokens,
            "in_flight": limits.in_flight,
        },
        "default_model": registry.default if registry.default in registry.loaded else None,
        "models": {name: model_info(model) for name, model in registry.loaded.items()},
    }


@functools.cache
def engine_versions() -> dict[str, str]:
    """Return the release of every engine's package that is installed."""
    versions = {}
    for package in ENGINES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def tasks(manifest: Manifest) -> list[str]:
    """Return what a model is asked for: classification, token-classification and so on.

    Of a model with several heads it is what the main one is asked for.
    """
    manifest = manifest.parts[0].manifest
    possible = {
        "classification": not manifest.labels_tokens,
        "token-classification": manifest.labels_tokens,
        "reranking": is_reranker(manifest),
        "zero-shot-classification": knows_entailment(manifest),
    }
    return [task for task, is_possible in possible.items() if is_possible]


def model_info(model: LoadedModel) -> dict[str, Any]:
    """Return what GET /info answers about one model."""
    manifest, runtime = model.artifact.manifest, model.classifier.runtime
    main = model.main.artifact.manifest
    variant = manifest.variants[model.choice.variant]
    return {
        "load_position": model.load_position,
        "digest": model.artifact.digest,
        "encoder_digest": variant.encoder_digest,
        "head_digest": variant.head_digest,
        "family": manifest.family,
        "task": main.task,
        "labels": main.labels,
        "heads": {name: head.model_dump() for name, head in manifest.heads.items()},
        "takes_pairs": manifest.takes_pairs,
        "tasks": tasks(manifest),
        "max_tokens": manifest.max_tokens,
        "parameters": manifest.parameters,
        "padding_safe": manifest.padding_invariant,
        "packs": model.classifier.packing is not None,
        "graph_digest": runtime.graph_digest,
        "kept_decoder_layers": manifest.kept_decoder_layers,
        "dropped": None if manifest.dropped is None else manifest.dropped.model_dump(),
        "variant": model.choice.variant,
        "runtime": runtime.name,
        "device": runtime.device,
        "precision": runtime.precision,
        "flush_to_zero": runtime.flush_to_zero,
        "flushed_weights": manifest.flushed_weights,
        "self_check": None if model.agreement is None else asdict(model.agreement),
        "why": model.choice.reason,
        "rates": [rate.model_dump() for rate in model.choice.rates],
        "gate": variant.gate.model_dump(),
        "parity": None if variant.parity is None else variant.parity.model_dump(),
    }
