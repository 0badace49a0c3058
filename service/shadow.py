"""
A second model answers a share of the first one's texts too, for nobody but the counters: would it
have said the same?

It runs in the batcher's background: a batch of it begins only when no caller's text waits. What it
costs is counted beside it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from service.batching.requests import Row
from service.errors import InvalidInput, ServiceError
from service.registry import Loaded, Models
from service.schemas import ClassifyRequest, Limits
from service.tokenization.encoding import by_text, encode

log = logging.getLogger(__name__)

AGREED, DIFFERED, DROPPED, FAILED = "agreed", "differed", "dropped", "failed"


@dataclass(frozen=True)
class Pairing:
    """Which model stands behind which, and for what share of its requests, 0 to 1."""

    shadow: str
    of: str
    fraction: float


class Shadow:
    """Asks the second model, beside the event loop's other work; agreement is that of the best
    label.
    """

    def __init__(self, models: Models, pairing: Pairing, limits: Limits) -> None:
        self._models = models
        self._pairing = pairing
        self._limits = limits
        self._draw = random.Random(0)
        self._running: set[asyncio.Task[None]] = set()
        self._counted: Counter[str] = Counter()
        self._seconds = 0.0

    def consider(self, answered_by: Loaded, asked: ClassifyRequest, rows: Sequence[Row]) -> None:
        """Notes an answer just given; for a share of them the second model is asked."""
        if answered_by.name == self._pairing.of and self._draw.random() < self._pairing.fraction:
            task = asyncio.create_task(self._ask(asked, answered_by, rows))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _ask(
        self, asked: ClassifyRequest, answered_by: Loaded, answers: Sequence[Row]
    ) -> None:
        models, name = self._models, self._pairing.shadow
        try:
            best = best_labels(answered_by, answers)
            with models.using(name) as model:
                found = await encode(model.classifier, asked, self._limits, models.executors)
                rows = await models.batcher.submit(
                    model.key, found.items, models.settings.request_timeout_s, background=True
                )
                _, rows = by_text(found, rows, asked.window.pool if asked.window else "first")
                own = best_labels(model, rows)
        except ServiceError as error:
            # Too much to do, or the model cannot take such a text: its callers never notice.
            self._count(FAILED if error.status == 500 else DROPPED, len(answers))
            return
        seconds = sum(row.inference_ns / row.batch_size for row in rows) / 1e9
        self._seconds += seconds
        models.metrics.shadow_seconds.labels(name).inc(seconds)
        for first, second in zip(best, own, strict=True):
            self._count(AGREED if first == second else DIFFERED, 1)

    def told(self) -> dict[str, float | str]:
        """What became of the texts so far, and the seconds of the engine that they took."""
        pairing = self._pairing
        counted = {
            outcome: self._counted[outcome] for outcome in (AGREED, DIFFERED, DROPPED, FAILED)
        }
        return {
            "shadow": pairing.shadow,
            "of": pairing.of,
            **counted,
            "engine_s": round(self._seconds, 3),
        }

    def _count(self, outcome: str, texts: int) -> None:
        self._counted[outcome] += texts
        self._models.metrics.shadowed.labels(self._pairing.shadow, self._pairing.of, outcome).inc(
            texts
        )


def best_labels(model: Loaded, rows: Sequence[Row]) -> list[str]:
    """Each row's; InvalidInput where the model gives a number, as one that was put in another one's
    place may.
    """
    manifest = model.artifact.manifest
    if manifest.task == "regression" or len(manifest.labels) == 1:
        raise InvalidInput(f"{model.name} answers with a number, which has no label to compare.")
    return [manifest.labels[int(row.value.argmax())] for row in rows]
