"""
The loaded models by name, behind one batcher.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from service import self_check
from service.artifact import Artifact
from service.batching.batcher import Batcher, BatchStats
from service.batching.queue import BatchLimits
from service.batching.requests import Result
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
    head: str | None = None
    """The head that it stands for, of a model with several; None: all of the model."""
    columns: slice | None = None
    """Its logits among those of the batcher's results; None: all of them."""
    whole: LoadedModel | None = None
    """The model whose head it is."""
    heads: dict[str, LoadedModel] = field(default_factory=dict)
    """Each head of a model with several, by name, the main one first."""

    def __post_init__(self) -> None:
        """Add its heads, which requests may name as NAME/HEAD."""
        for head, view in self.artifact.manifest.by_head.items():
            self.heads[head] = replace(
                self,
                artifact=replace(self.artifact, manifest=view.manifest),
                head=head,
                columns=view.columns,
                whole=self,
                heads={},
            )

    @property
    def main(self) -> LoadedModel:
        """The head that answers requests which name the model alone; itself if it has one head."""
        return next(iter(self.heads.values()), self)

    @property
    def full_name(self) -> str:
        """What requests call it: the model's name, and the head's if it stands for one."""
        return self.name if self.head is None else f"{self.name}/{self.head}"

    @property
    def identity(self) -> str:
        """What decides its answers: the artifact's digest, the variant and the engine."""
        return f"{self.artifact.digest} {self.choice.variant} {self.choice.runtime}"

    @property
    def is_on_gpu(self) -> bool:
        """Whether its engine runs on a GPU."""
        return self.choice.runtime in ON_A_GPU

    def __enter__(self) -> LoadedModel:
        (self.whole or self).users += 1
        return self

    def __exit__(self, *_: object) -> None:
        (self.whole or self).users -= 1

    def results_of_head(self, results: Sequence[Result]) -> list[Result]:
        """Return results with the logits of its head only."""
        if self.columns is None:
            return list(results)
        return [replace(result, value=result.value[self.columns]) for result in results]


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
        is_serving: bool = False,
    ) -> tuple[LoadedModel, LoadedModel | None]:
        """Load a model, warm it up, and only then answer requests with it.

        Return it and the model of that name that it replaced, if any, for `release_when_idle`.
        `is_wanted` is asked just before it would answer requests: raises LoadInProgress if the
        load has been given up. `stopping` ends the warm-up early. While the service `is_serving`,
        engines are not measured. Raises what `load_engine` does.
        """
        # Not under the lock: a load that hangs on a lost file system would hold it for ever.
        options = replace(self._options, is_serving=is_serving)
        model = self._load(name, artifact, options, stopping)
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
            if model.whole is not None:
                raise InvalidInput(
                    f"{name} is a head of {model.name}; unload that model.", param="model"
                )
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
            # They refer to each other, and the garbage collector runs seldom.
            model.heads.clear()
            if model.name not in self.loaded:
                self._metrics.remove_model(model.name)
        log.info("model let go", extra={"model": model.name, "digest": model.artifact.digest})

    def acquire(self, name: str | None) -> LoadedModel:
        """Return the model of that name, or the default one, for a `with` block.

        It is not freed before the block ends. Raises UnknownModel, with the names that are loaded.
        """
        if name is None and self.default not in self.loaded:
            raise UnknownModel(
                f"The default model is not loaded any more; name one of {', '.join(self.names())}.",
                param="model",
            )
        return self.get(self.default if name is None else name)

    def get(self, name: str) -> LoadedModel:
        """Return the model of that name, or the head NAME/HEAD; raises UnknownModel."""
        model = self.loaded.get(name)
        if model is None:
            whole, _, head = name.rpartition("/")
            model = self.loaded[whole].heads.get(head) if whole in self.loaded else None
        if model is None:
            raise UnknownModel(
                f"No model has that name; loaded are {', '.join(self.names())}.", param="model"
            )
        return model

    def names(self) -> dict[str, LoadedModel]:
        """Return what a request may name: each model, followed by its heads if it has several."""
        named: dict[str, LoadedModel] = {}
        for name, model in self.loaded.items():
            named[name] = model
            named |= {head.full_name: head for head in model.heads.values()}
        return named | self.loaded

    def set_default(self, name: str) -> None:
        """Answer requests that name no model with this one; raises UnknownModel.

        Raises InvalidInput for a head: the default is a model, whose main head answers.
        """
        model = self.get(name)
        if model.whole is not None:
            raise InvalidInput(f"{name} is a head of {model.name}; name that model.", param="model")
        self.default = name

    def _load(
        self, name: str, artifact: Artifact, options: LoadOptions, stopping: Callable[[], bool]
    ) -> LoadedModel:
        engine = load_engine(name, artifact, options, stopping)
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
