"""
The service with an engine that fails on purpose, whenever a batch holds a text of a certain number
of tokens.

    python -m tests.chaos.broken raises|nan|few|slow|stalls|breaks ARTIFACT --port 8000
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from service import registry
from service.__main__ import main
from service.errors import EngineBroken
from service.runtimes import Inputs, Logits, Runtime, auto

FATAL_TOKENS = 7
"""Five words and the two special tokens. The warm-up runs even lengths only."""

SLOW_STEPS = 100
"""Hundredths of a second that a slow batch takes."""


class Broken:
    """A runtime around another one."""

    def __init__(self, runtime: Runtime, how: str) -> None:
        self._runtime, self._how = runtime, how

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        finish = self._runtime.start(inputs)
        fatal = tokens_of(inputs) == FATAL_TOKENS
        return (lambda: self._fail(finish(), fatal)) if fatal.any() else finish

    def _fail(self, logits: Logits, fatal: np.ndarray) -> Logits:
        if self._how == "raises":
            raise RuntimeError("the engine failed on purpose")
        if self._how == "few":
            return logits[
                :0
            ]  # Where texts share rows, the engine answers more than there are texts.
        if self._how == "slow":
            # In steps, as an engine works: a process that is paused goes on where it was.
            for _ in range(SLOW_STEPS):
                time.sleep(0.01)
            return logits
        if self._how == "stalls":
            threading.Event().wait()
        if self._how == "breaks":
            raise EngineBroken("The engine broke on purpose; this replica will end.")
        spoiled = logits.copy()
        spoiled[fatal] = np.nan
        return spoiled


def tokens_of(inputs: Inputs) -> np.ndarray:
    """How many tokens each text of a batch has, (answers of the engine). Where texts share a row,
    the mask numbers them.
    """
    mask = inputs["attention_mask"]
    if "first_tokens" not in inputs:
        return np.asarray(mask.sum(axis=1))
    rows, places = np.divmod(inputs["first_tokens"], mask.shape[1])
    return np.asarray((mask[rows] == mask[rows, places][:, None]).sum(axis=1))


if __name__ == "__main__":
    how, *rest = sys.argv[1:]
    real = auto.load
    setattr(registry, "load", lambda *arguments: Broken(real(*arguments), how))  # noqa: B010  what it imported by name
    sys.exit(main(rest))
