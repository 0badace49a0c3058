"""
The loaded models and the state they are in together: loading, ready, draining.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from service import cpus
from service.artifact import Artifact
from service.batcher import Batcher
from service.classifier import Classifier
from service.errors import NotReady, ShuttingDown, UnknownModel
from service.metrics import Metrics
from service.runtimes.auto import Choice, choose, load
from service.settings import Settings
from service.shapes import Shapes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    artifact: Artifact
    choice: Choice
    classifier: Classifier
    load_position: int


class Models:
    """Models by name, in the order they were given, behind one batcher."""

    def __init__(self, artifacts: dict[str, Artifact], settings: Settings, variant: str = "auto") -> None:
        self.settings = settings
        self.instance_id = uuid.uuid4().hex
        self.started = int(time.time())
        self.version = importlib.metadata.version("drbert-serve")
        self.threads = settings.threads or cpus.usable()
        self.loaded: dict[str, Loaded] = {}
        self.metrics = Metrics(CollectorRegistry(), waiting=lambda: self.batcher.waiting, answering=lambda: self.answering)
        self.answering = 0
        """Requests that are being answered."""
        self._artifacts = artifacts
        self._variant = variant
        self._state = "loading"
        self._stopping = threading.Event()
        self._classifiers: dict[str, Classifier] = {}
        self.batcher = Batcher(
            self._classifiers,
            max_batch_size=settings.max_batch_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_waiting=settings.max_waiting,
            batch_size=Shapes(2, settings.max_batch_size).batch_size,
            on_batch=self.metrics.add_batch,
        )

    def load(self) -> None:
        """Loads and warms up every model in order, then takes requests; gives up between two steps once draining."""
        for position, (name, artifact) in enumerate(self._artifacts.items()):
            if self._stopping.is_set():
                return
            choice = choose(artifact, self._variant, self.settings.runtime)
            began = time.monotonic()
            classifier = Classifier(artifact, load(artifact, choice, self.threads), self.settings.max_batch_size)
            loaded = time.monotonic()
            shapes = classifier.warm_up(self.settings.warm_up_s, self._stopping.is_set)
            self._classifiers[name] = classifier
            self.loaded[name] = Loaded(artifact, choice, classifier, position)
            self.metrics.add_model(name, artifact.digest, artifact.manifest.variants[choice.variant].encoder_digest, choice.runtime, choice.variant)
            log.info("model ready", extra={
                "model": name, "artifact": str(artifact.directory), "variant": choice.variant, "runtime": choice.runtime,
                "why": choice.why, "threads": self.threads, "load_s": round(loaded - began, 3),
                "warm_up_s": round(time.monotonic() - loaded, 3), "shapes": shapes,
            })
            if artifact.manifest.kept_decoder_layers:
                log.warning("this model keeps its pretraining decoder as a control: its answers mean nothing", extra={"model": name})
        self.batcher.in_flight = min(c.runtime.in_flight for c in self._classifiers.values())
        if self._stopping.is_set():
            return
        self.batcher.start()
        self._state = "ready"
        self.metrics.ready.set(1)

    async def drain(self) -> bool:
        """Refuses new requests, finishes the accepted ones, and says whether it could in time."""
        self._state = "draining"
        self._stopping.set()
        self.metrics.ready.set(0)
        return await self.batcher.close(self.settings.drain_timeout_s)

    async def idle(self, timeout_s: float) -> None:
        """Waits until no request is being answered, at most so long."""
        give_up = time.monotonic() + timeout_s
        while self.answering and time.monotonic() < give_up:
            await asyncio.sleep(0.005)

    def check_ready(self) -> None:
        if self._state == "loading":
            raise NotReady(f"Loading: {len(self.loaded)} of {len(self._artifacts)} models are ready.", retry_after_s=1)
        if self._state == "draining":
            raise ShuttingDown("This replica is draining; another one answers.")
        if not self.batcher.alive:
            raise NotReady("The thread that runs the models has ended; restart this replica.")

    def get(self, name: str | None) -> tuple[str, Classifier]:
        """The model of that name, or the first; UnknownModel lists the names there are."""
        self.check_ready()
        if name is None:
            name = next(iter(self._classifiers))
        if name not in self._classifiers:
            raise UnknownModel(f"No model has that name; loaded are {', '.join(self._classifiers)}.", param="model")
        return name, self._classifiers[name]

    def info(self) -> dict[str, Any]:
        return {
            "service": "drbert-serve", "version": self.version, "instance_id": self.instance_id, "started": self.started,
            "state": self._state, "threads": self.threads, "settings": self.settings.model_dump(),
            "models": {name: _describe(loaded) for name, loaded in dict(self.loaded).items()},
        }


def _describe(loaded: Loaded) -> dict[str, Any]:
    manifest, runtime = loaded.artifact.manifest, loaded.classifier.runtime
    variant = manifest.variants[loaded.choice.variant]
    return {
        "load_position": loaded.load_position, "digest": loaded.artifact.digest,
        "encoder_digest": variant.encoder_digest, "head_digest": variant.head_digest,
        "family": manifest.family, "task": manifest.task, "labels": manifest.labels, "takes_pairs": manifest.takes_pairs,
        "max_tokens": manifest.max_tokens, "parameters": manifest.parameters, "padding_safe": manifest.padding_safe,
        "kept_decoder_layers": manifest.kept_decoder_layers,
        "dropped": None if manifest.dropped is None else manifest.dropped.model_dump(),
        "variant": loaded.choice.variant, "runtime": runtime.name, "device": runtime.device, "precision": runtime.precision,
        "flush_to_zero": runtime.flush_to_zero, "why": loaded.choice.why, "gate": variant.gate.model_dump(),
        "parity": None if variant.parity is None else variant.parity.model_dump(),
    }
