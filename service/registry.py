"""
The loaded models by name, behind one batcher.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from service import self_check
from service.artifact import Artifact
from service.batching.batcher import Batcher, BatchStats
from service.batching.queue import BatchLimits
from service.classifier import Classifier
from service.errors import InvalidInput, LoadInProgress, UnknownModel
from service.host import cpu_time
from service.loading.engine import LoadOptions, load_engine
from service.runtimes.auto import ON_A_GPU, Choice
from service.settings import Settings
from service.telemetry.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(eq=False)
class LoadedModel:
    """One load of a model. Loading it again makes another one, under the same name."""

    name: str
    artifact: Artifact
    choice: Choice
    classifier: Classifier
    load_position: int
    key: str
    """What the batcher calls the model: its name and its load position."""
    agreement: self_check.Agreement | None = None
    """With the answers of the exporting host; None if the artifact holds none."""
    users: int = 0
    """Requests that acquired the model and are not answered yet."""

    @property
    def identity(self) -> str:
        """What decides its answers: the artifact's digest, the variant and the engine."""
        return f"{self.artifact.digest} {self.choice.variant} {self.choice.runtime}"

    @property
    def is_on_gpu(self) -> bool:
        """Whether its engine runs on a GPU."""
        return self.choice.runtime in ON_A_GPU

    def __enter__(self) -> LoadedModel:
        self.users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.users -= 1


class ModelRegistry:
    """Models by name, in the order in which they were loaded."""

    def __init__(self, settings: Settings, options: LoadOptions, metrics: Metrics) -> None:
        self.loaded: dict[str, LoadedModel] = {}
        self.default = ""
        """The model for requests that name none. It may have been unloaded."""
        self._options = options
        self._metrics = metrics
        self._load_positions = itertools.count()
        self._lock = threading.Lock()
        self._classifiers: dict[str, Classifier] = {}
        self._names: dict[str, str] = {}
        self.batcher = Batcher(
            self._classifiers,
            max_queue_size=settings.max_queue_size,
            on_batch=self._count_batch,
            max_queue_s=settings.max_queue_s or settings.request_timeout_s,
            cpu_clock=cpu_time.engine_ns,
        )

    def add(
        self,
        name: str,
        artifact: Artifact,
        is_wanted: Callable[[], bool] = lambda: True,
        stopping: Callable[[], bool] = lambda: False,
    ) -> tuple[LoadedModel, LoadedModel | None]:
        """Load a model, warm it up, and only then answer requests with it.

        Return it and the model of that name that it replaced, if any, for `release_when_idle`.
        `is_wanted` is asked just before it would answer requests: raises LoadInProgress if the
        load has been given up. `stopping` ends the warm-up early. Raises what `load_engine` does.
        """
        # Not under the lock: a load that hangs on a lost file system would hold it for ever.
        model = self._load(name, artifact, stopping)
        with self._lock:
            if not is_wanted():
                raise LoadInProgress("The load was given up before it was done.")
            self._classifiers[model.key] = model.classifier
            if model.classifier.warm_batch is not None:
                self.batcher.queue.capacity.expect(model.key, *model.classifier.warm_batch)
            self._names[model.key] = name
            self._configure_batcher()
            manifest = artifact.manifest
            self._metrics.add_model(
                name,
                artifact.digest,
                manifest.variants[model.choice.variant].encoder_digest,
                model.choice.runtime,
                model.choice.variant,
            )
            # One assignment: a request gets the old model or the new one.
            replaced = self.loaded.get(name)
            self.loaded = {**self.loaded, name: model}
        if manifest.kept_decoder_layers:
            log.warning(
                "this model keeps its pretraining decoder as a control: its answers mean nothing",
                extra={"model": name},
            )
        return model, replaced

    def remove(self, name: str) -> LoadedModel:
        """Stop giving a model to requests, and return it for `release_when_idle`.

        Raises UnknownModel if there is none of that name, InvalidInput if it is the last one.
        """
        with self._lock:
            model = self.get(name)
            if len(self.loaded) == 1:
                raise InvalidInput(
                    f"{name} is the only model; load another one first.", param="model"
                )
            self.loaded = {other: loaded for other, loaded in self.loaded.items() if other != name}
            log.info("model unloaded", extra={"model": name})
            return model

    async def release_when_idle(self, model: LoadedModel) -> None:
        """Free a replaced or removed model once every request that acquired it is answered."""
        while model.users:
            await asyncio.sleep(0.01)
        with self._lock:
            del self._classifiers[model.key], self._names[model.key]
            self.batcher.queue.capacity.forget(model.key)
            self._configure_batcher()
            if model.name not in self.loaded:
                self._metrics.remove_model(model.name)
        log.info("model let go", extra={"model": model.name, "digest": model.artifact.digest})

    def acquire(self, name: str | None) -> LoadedModel:
        """Return the model of that name, or the default one, for a `with` block.

        It is not freed before the block ends. Raises UnknownModel, with the names that are loaded.
        """
        if name is None and self.default not in self.loaded:
            raise UnknownModel(
                f"The default model is not loaded any more; name one of {', '.join(self.loaded)}.",
                param="model",
            )
        return self.get(self.default if name is None else name)

    def get(self, name: str) -> LoadedModel:
        """Return the model of that name; raises UnknownModel if it is not loaded."""
        model = self.loaded.get(name)
        if model is None:
            raise UnknownModel(
                f"No model has that name; loaded are {', '.join(self.loaded)}.", param="model"
            )
        return model

    def set_default(self, name: str) -> None:
        """Answer requests that name no model with this one; raises UnknownModel."""
        self.default = self.get(name).name

    def _load(self, name: str, artifact: Artifact, stopping: Callable[[], bool]) -> LoadedModel:
        engine = load_engine(name, artifact, self._options, stopping)
        position = next(self._load_positions)
        return LoadedModel(
            name,
            artifact,
            engine.choice,
            engine.classifier,
            position,
            key=f"{name}#{position}",
            agreement=engine.agreement,
        )

    def _configure_batcher(self) -> None:
        """All models share one queue, so it uses the strictest limits of any of them."""
        classifiers = list(self._classifiers.values())
        # A model whose texts are packed has limits of its own.
        unpacked = [each for each in classifiers if each.packing is None] or classifiers
        strictest = min(
            (each.shapes for each in unpacked),
            key=lambda shapes: (shapes.grid.padded_rows, shapes.max_batch_size),
        )
        self.batcher.limits = BatchLimits(
            size=strictest.max_batch_size,
            tokens=min(each.shapes.max_batch_tokens for each in classifiers),
            round_down=strictest.batch_size,
            rows=strictest.rows,
            in_flight=min(each.runtime.in_flight for each in classifiers),
        )

    def _count_batch(self, batch: BatchStats) -> None:
        name = self._names.get(batch.model)
        if name is not None and name in self.loaded:
            self._metrics.add_batch(name, batch)
