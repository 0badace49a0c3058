"""
Shadow traffic: a second model computes a share of the first one's texts, and only metrics see it.

It runs as background work: a batch of it begins only when no caller's text waits. Agreement and
cost are counted.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from service.batching.requests import Result
from service.errors import InvalidInput, ServiceError
from service.registry import LoadedModel
from service.schemas import ClassifyRequest, Limits
from service.state import ServiceState
from service.tokenization.encoding import encode, merge_windows

log = logging.getLogger(__name__)

OUTCOMES = AGREED, DIFFERED, DROPPED, FAILED = "agreed", "differed", "dropped", "failed"


@dataclass(frozen=True)
class Pairing:
    """Which model shadows which."""

    shadow: str
    of: str
    """The model that answers."""
    fraction: float
    """Share of its requests that the shadow computes too, 0 to 1."""


class Shadow:
    """Runs the second model in the background; answers agree if their best labels do."""

    def __init__(self, service: ServiceState, pairing: Pairing, limits: Limits) -> None:
        self._service = service
        self._pairing = pairing
        self._limits = limits
        self._draw = random.Random(0)
        self._running: set[asyncio.Task[None]] = set()
        self._outcomes: Counter[str] = Counter()
        self._seconds = 0.0

    def consider(
        self, model: LoadedModel, request: ClassifyRequest, results: Sequence[Result]
    ) -> None:
        """Run the second model for a share of the requests that `model` has answered.

        A head that is not the main one is compared with the shadow's head of that name, if there is
        one.
        """
        if model.name != self._pairing.of:
            return
        is_main = model.whole is None or model is model.whole.main
        head = None if is_main else model.head
        shadow = self._service.registry.loaded.get(self._pairing.shadow)
        if head is not None and shadow is not None and head not in shadow.heads:
            return
        if self._draw.random() < self._pairing.fraction:
            task = asyncio.create_task(self._compare(request, model, results, head))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _compare(
        self,
        request: ClassifyRequest,
        answered_by: LoadedModel,
        answers: Sequence[Result],
        head: str | None,
    ) -> None:
        service, name = self._service, self._pairing.shadow
        pool = request.window.pool if request.window else "first"
        try:
            expected = best_labels(answered_by, answers)
            with service.acquire(name if head is None else f"{name}/{head}") as model:
                encoded = await encode(model.classifier, request, self._limits, service.executors)
                results = await service.batcher.submit(
                    model.key, encoded.items, service.settings.request_timeout_s, background=True
                )
                _, results = merge_windows(encoded, results, pool)
                labels = best_labels(model.main, model.main.results_of_head(results))
        except ServiceError as error:
            # Too much work, or the model cannot take such a text. Callers never notice.
            self._count(FAILED if error.status == 500 else DROPPED, len(answers))
            return
        seconds = sum(result.inference_ns / result.batch_size for result in results) / 1e9
        self._seconds += seconds
        service.metrics.shadow_seconds.labels(name).inc(seconds)
        for first, second in zip(expected, labels, strict=True):
            self._count(AGREED if first == second else DIFFERED, 1)

    def summary(self) -> dict[str, float | str]:
        """Return the number of texts by outcome, and the engine seconds that they took."""
        outcomes = {outcome: self._outcomes[outcome] for outcome in OUTCOMES}
        return {
            "shadow": self._pairing.shadow,
            "of": self._pairing.of,
            **outcomes,
            "engine_s": round(self._seconds, 3),
        }

    def _count(self, outcome: str, texts: int) -> None:
        self._outcomes[outcome] += texts
        self._service.metrics.shadowed.labels(self._pairing.shadow, self._pairing.of, outcome).inc(
            texts
        )


def best_labels(model: LoadedModel, results: Sequence[Result]) -> list[str]:
    """Return the best label of each result; raises InvalidInput if a text has no label."""
    manifest = model.artifact.manifest
    if manifest.labels_tokens:
        raise InvalidInput(f"{model.name} labels tokens, so its texts have no label to compare.")
    if manifest.task == "regression" or len(manifest.labels) == 1:
        raise InvalidInput(f"{model.name} returns a number, which has no label to compare.")
    return [manifest.labels[int(result.value.argmax())] for result in results]
