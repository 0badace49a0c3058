"""
The loaded models and the state they are in together: loading, ready, draining.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import logging
import threading
import time
import tomllib
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from command import BadInput, CommandError
from service import self_check
from service.artifact import Artifact
from service.batching.batcher import Batch, Batcher
from service.classifier import Classifier
from service.errors import (
    InvalidInput,
    LoadInProgress,
    NotReady,
    ServiceError,
    ShuttingDown,
    UnknownModel,
)
from service.host import cpus, gpus, memory
from service.host.executors import Executors
from service.http.metrics_page import MetricsPage
from service.http.transport.bodies import LargeBodies
from service.http.transport.pacing import Turns
from service.http.transport.protocol import Room
from service.runtimes.auto import ON_A_GPU, Choice, choose, load
from service.runtimes.cuda import GpuOptions
from service.settings import Settings
from service.telemetry import nvml
from service.telemetry.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Loaded:
    """One model as it was loaded once: loading it again makes another one, under the same name."""

    name: str
    artifact: Artifact
    choice: Choice
    classifier: Classifier
    load_position: int
    key: str
    """What the batcher calls it."""
    agreement: self_check.Agreement | None = None
    """With the answers of the exporting host; None if the artifact holds none."""
    users: int = 0
    """Requests that were given it and are not answered yet."""

    def __enter__(self) -> Loaded:
        self.users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.users -= 1


def own_version() -> str:
    """The version of what is installed, or of the checkout that is run as it is."""
    try:
        return importlib.metadata.version("drbert-serve")
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).parent.parent / "pyproject.toml"
        return (
            str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])
            if pyproject.is_file()
            else "unknown"
        )


class Models:
    """Models by name, in the order they were given, behind one batcher."""

    def __init__(
        self, artifacts: dict[str, Artifact], settings: Settings, variant: str = "auto"
    ) -> None:
        self.settings = settings
        self.instance_id = uuid.uuid4().hex
        self.started = int(time.time())
        self.version = own_version()
        self.threads = settings.threads or cpus.usable()
        self._gpu = GpuOptions(
            memory_bytes=(
                None if settings.gpu_memory_mib is None else settings.gpu_memory_mib * 2**20
            ),
            shapes_file=settings.gpu_shapes_file,
            cache=settings.gpu_cache,
            graphs=settings.gpu_graphs,
        )
        self.loaded: dict[str, Loaded] = {}
        self.default = next(iter(artifacts), "")
        """The name of the model that answers requests that name none; there may be no such model
        any more.
        """
        self.metrics = Metrics(
            CollectorRegistry(),
            readings=nvml.readings,
            waiting=lambda: self.batcher.waiting,
            answering=lambda: self.answering,
            waiting_s=lambda: self.batcher.queue_s,
        )
        self.answering = 0
        """Requests that are being answered."""
        self.room = Room(settings.max_inflight_body_bytes)
        self.large_bodies = LargeBodies(settings.max_body_bytes)
        self.executors = Executors(settings.max_queue_size)
        self.refusals = Turns()
        self.metrics_page = MetricsPage(self.metrics, self.executors.metrics)
        self.stalled = False
        """Whether the engine has had a batch for longer than it is allowed."""
        self._artifacts = artifacts
        self._variant = variant
        self._state = "loading"
        self._refuses = False
        self._stopping = threading.Event()
        self._loads = itertools.count()
        self._changing = threading.Lock()
        self._classifiers: dict[str, Classifier] = {}
        self._names: dict[str, str] = {}
        self.batcher = Batcher(
            self._classifiers,
            max_waiting=settings.max_queue_size,
            on_batch=self._count,
            max_queue_s=settings.max_queue_s or settings.request_timeout_s,
        )

    def load(self) -> None:
        """Loads and warms up every model in order, then takes requests; gives up between two steps
        once draining.
        """
        for name, artifact in self._artifacts.items():
            if self._stopping.is_set():
                return
            self.add(name, artifact)
        if self._stopping.is_set():
            return
        self.batcher.start()
        self._state = "ready"
        self.metrics.ready.set(1)

    def add(
        self, name: str, artifact: Artifact, wanted: Callable[[], bool] = lambda: True
    ) -> tuple[Loaded, Loaded | None]:
        """Loads and warms up a model, and only then answers with it: in the place of the one of
        that name, if there is one.

        That one is returned too, for `forget`. `wanted` is asked once it could answer;
        LoadInProgress if it is not any more.
        """
        # Not under the lock: what never comes back from a file system that has gone would hold it
        # for ever.
        made = self._make(name, artifact)
        with self._changing:
            if not wanted():
                raise LoadInProgress("The load was given up before it was done.")
            self._classifiers[made.key] = made.classifier
            if made.classifier.warm_batch is not None:
                self.batcher.queue.capacity.expect(made.key, *made.classifier.warm_batch)
            self._names[made.key] = name
            self._suit_the_batcher()
            manifest = artifact.manifest
            self.metrics.add_model(
                name,
                artifact.digest,
                manifest.variants[made.choice.variant].encoder_digest,
                made.choice.runtime,
                made.choice.variant,
            )
            # One assignment: a request is given the old one or the new one.
            replaced = self.loaded.get(name)
            self.loaded = {**self.loaded, name: made}
            if manifest.kept_decoder_layers:
                log.warning(
                    "this model keeps its pretraining decoder as a control: its answers mean"
                    " nothing",
                    extra={"model": name},
                )
            return made, replaced

    def _suit_the_batcher(self) -> None:
        """One queue for all: its batches are such that every model's runtime likes them."""
        classifiers = list(self._classifiers.values())
        # What shares rows keeps limits of its own.
        limited = [one for one in classifiers if one.packing is None] or classifiers
        strictest = min(
            (one.shapes for one in limited),
            key=lambda shapes: (shapes.grid.padded_rows, shapes.max_batch_size),
        )
        self.batcher.in_flight = min(one.runtime.in_flight for one in classifiers)
        self.batcher.max_batch_size = strictest.max_batch_size
        self.batcher.max_batch_tokens = min(one.shapes.max_batch_tokens for one in classifiers)
        self.batcher.batch_size, self.batcher.rows = strictest.batch_size, strictest.rows

    def remove(self, name: str) -> Loaded:
        """Answers no more requests with the model and returns it, for `forget`; UnknownModel if
        there is none, InvalidInput if it is the last.
        """
        with self._changing:
            old = self._one(name)
            if len(self.loaded) == 1:
                raise InvalidInput(
                    f"{name} is the only model; load another one first.", param="model"
                )
            self.loaded = {other: loaded for other, loaded in self.loaded.items() if other != name}
            log.info("model unloaded", extra={"model": name})
            return old

    async def forget(self, old: Loaded) -> None:
        """Lets go of a model that was replaced or removed, as soon as every request that was given
        it is answered.
        """
        while old.users:
            await asyncio.sleep(0.01)
        del self._classifiers[old.key], self._names[old.key]
        self.batcher.queue.capacity.forget(old.key)
        if old.name not in self.loaded:
            self.metrics.remove_model(old.name)
        log.info("model let go", extra={"model": old.name, "digest": old.artifact.digest})

    def _count(self, batch: Batch) -> None:
        name = self._names.get(batch.model)
        if name is not None and name in self.loaded:
            self.metrics.add_batch(name, batch)

    def _make(self, name: str, artifact: Artifact) -> Loaded:
        """The model in the variant that was asked for or, on `auto`, in the fastest that answers
        here as it did where it was exported.
        """
        rejected: dict[str, str] = {}
        while True:
            choice = choose(artifact, self._variant, self.settings.runtime, rejected=rejected)
            try:
                return self._load(name, artifact, choice)
            except self_check.AnswersDiffer as error:
                if self._variant != "auto":
                    raise
                log.error(
                    "a variant failed its self-check",
                    exc_info=error.__cause__,
                    extra={"model": name, "variant": choice.variant, "why": str(error)},
                )
                rejected[choice.variant] = str(error)

    def _load(self, name: str, artifact: Artifact, choice: Choice) -> Loaded:
        began = time.monotonic()
        try:
            classifier = Classifier(
                artifact,
                load(artifact, choice, self.threads, self._gpu),
                self.settings.max_batch_size,
                self.settings.max_batch_tokens,
            )
            artifact.check_unchanged()
            loaded = time.monotonic()
            # First, for what cannot be right need not be warm; but a GPU's memory is laid out by
            # the largest shape, which comes first.
            warm_first = classifier.shapes.grid.all_warm
            agreement = None if warm_first else self_check.check(classifier, choice.variant)
            shapes = classifier.warm_up(self.settings.warm_up_s, self._stopping.is_set)
            agreement = self_check.check(classifier, choice.variant) if warm_first else agreement
            artifact.check_unchanged()  # what is mapped into memory may be read as late as now
        except BaseException as error:  # a panic of Rust, as of the tokenizer's, is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            if choice.runtime not in ON_A_GPU and memory.ran_out(error):
                raise memory.not_enough(
                    name,
                    choice.variant,
                    artifact.manifest.variants[choice.variant].weight_bytes,
                    error,
                ) from error
            if isinstance(error, CommandError | ServiceError):
                raise
            # Digests vouch for a file's bytes, not that an engine or a tokenizer can use them;
            # those raise whatever they like.
            raise BadInput(
                f"{artifact.directory} cannot be loaded ({type(error).__name__}: {error}); export"
                " it again."
            ) from error
        position = next(self._loads)
        log.info(
            "model ready",
            extra={
                "model": name,
                "artifact": str(artifact.directory),
                "variant": choice.variant,
                "runtime": choice.runtime,
                "why": choice.why,
                "threads": self.threads,
                "load_s": round(loaded - began, 3),
                "warm_up_s": round(time.monotonic() - loaded, 3),
                "shapes": shapes,
            },
        )
        if agreement is None:
            log.warning(
                "this artifact holds no self-check: whether this processor computes it rightly is"
                " not known; export it again",
                extra={"model": name},
            )
        return Loaded(
            name,
            artifact,
            choice,
            classifier,
            position,
            key=f"{name}#{position}",
            agreement=agreement,
        )

    def start_draining(self) -> None:
        """Is not ready any more, so that clients go elsewhere; requests that still come are
        answered until `drain`.
        """
        self._state = "draining"
        self._stopping.set()
        self.metrics.ready.set(0)

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Refuses new requests, finishes the accepted ones, and says whether it could in time."""
        self.start_draining()
        self._refuses = True
        return await self.batcher.close(
            self.settings.drain_timeout_s if timeout_s is None else timeout_s
        )

    async def idle(self, timeout_s: float) -> None:
        """Waits until no request is being answered, at most so long."""
        give_up = time.monotonic() + timeout_s
        while self.answering and time.monotonic() < give_up:
            await asyncio.sleep(0.005)

    def check_ready(self) -> None:
        """Raises unless this replica is to be sent requests."""
        if self._state == "draining":
            raise ShuttingDown("This replica is draining; another one answers.")
        self.check_accepting()

    def check_accepting(self) -> None:
        """Raises unless requests are answered; those that come while clients are told to go
        elsewhere still are.
        """
        if self._refuses:
            raise ShuttingDown("This replica is draining; another one answers.")
        if self._state == "loading" or not self.loaded:
            raise NotReady(
                f"Loading: {len(self.loaded)} of {len(self._artifacts)} models are ready.",
                retry_after_s=1,
            )
        if not self.batcher.alive:
            raise NotReady("The thread that runs the models has ended; restart this replica.")
        if self.stalled:
            raise NotReady("A batch has not come back from the engine; this replica will end.")

    def note_stall(self, stalled: bool) -> None:
        """Notes whether the engine has had a batch for too long: then no requests are taken."""
        self.stalled = stalled
        self.metrics.ready.set(self._state == "ready" and not stalled)

    def check_not_saturated(self) -> None:
        """Raises NotReady if the queue has been too full for longer than is allowed, where anything
        is.
        """
        limit_s = self.settings.saturated_after_s
        if limit_s is not None and (full_s := self.batcher.queue.full_s) > limit_s:
            raise NotReady(f"The queue has been full for {full_s:.0f} s.", retry_after_s=1)

    def using(self, name: str | None) -> Loaded:
        """The model of that name, or the default, for a block in which it stays; UnknownModel lists
        the names there are.
        """
        self.check_accepting()
        if name is None and self.default not in self.loaded:
            raise UnknownModel(
                f"The default model is not loaded any more; name one of {', '.join(self.loaded)}.",
                param="model",
            )
        return self._one(self.default if name is None else name)

    def set_default(self, name: str) -> None:
        """Answers requests that name no model with this one; UnknownModel if there is none of that
        name.
        """
        self.default = self._one(name).name

    def _one(self, name: str) -> Loaded:
        found = self.loaded.get(name)
        if found is None:
            raise UnknownModel(
                f"No model has that name; loaded are {', '.join(self.loaded)}.", param="model"
            )
        return found

    def info(self) -> dict[str, Any]:
        return {
            "service": "drbert-serve",
            "version": self.version,
            "instance_id": self.instance_id,
            "started": self.started,
            "state": self._state,
            "threads": self.threads,
            "gpus": gpus.told(gpus.visible()),
            "settings": self.settings.to_dict(),
            "batching": {
                "max_batch_size": self.batcher.max_batch_size,
                "max_batch_tokens": self.batcher.max_batch_tokens,
                "in_flight": self.batcher.in_flight,
            },
            "default_model": self.default if self.default in self.loaded else None,
            "models": {name: _describe(loaded) for name, loaded in self.loaded.items()},
        }


def _describe(loaded: Loaded) -> dict[str, Any]:
    manifest, runtime = loaded.artifact.manifest, loaded.classifier.runtime
    variant = manifest.variants[loaded.choice.variant]
    return {
        "load_position": loaded.load_position,
        "digest": loaded.artifact.digest,
        "encoder_digest": variant.encoder_digest,
        "head_digest": variant.head_digest,
        "family": manifest.family,
        "task": manifest.task,
        "labels": manifest.labels,
        "takes_pairs": manifest.takes_pairs,
        "max_tokens": manifest.max_tokens,
        "parameters": manifest.parameters,
        "padding_safe": manifest.padding_safe,
        "packs": loaded.classifier.packing is not None,
        "kept_decoder_layers": manifest.kept_decoder_layers,
        "dropped": None if manifest.dropped is None else manifest.dropped.model_dump(),
        "variant": loaded.choice.variant,
        "runtime": runtime.name,
        "device": runtime.device,
        "precision": runtime.precision,
        "flush_to_zero": runtime.flush_to_zero,
        "flushed_weights": manifest.flushed_weights,
        "self_check": None if loaded.agreement is None else asdict(loaded.agreement),
        "why": loaded.choice.why,
        "gate": variant.gate.model_dump(),
        "parity": None if variant.parity is None else variant.parity.model_dump(),
    }
