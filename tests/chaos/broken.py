"""
The service with an engine that fails on purpose, for batches with a text of FATAL_TOKENS tokens.

    python -m tests.chaos.broken raises|nan|few|slow|stalls|breaks ARTIFACT --port 8000
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from service.__main__ import main
from service.errors import EngineBroken
from service.loading import engine
from service.runtimes import Inputs, Logits, Runtime

FATAL_TOKENS = 7
"""Token count of a text that makes the engine fail: five words and the two special tokens.

The warm-up runs even lengths only, so it does not fail.
"""

SLOW_STEPS = 100
"""Steps of a slow batch, of 10 ms each."""


class BrokenRuntime:
    """A runtime around another one that fails in the way `failure` for fatal batches."""

    def __init__(self, runtime: Runtime, failure: str) -> None:
        self._runtime, self._failure = runtime, failure

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        """Start a batch; the returned function fails if a text has FATAL_TOKENS tokens."""
        finish = self._runtime.start(inputs)
        fatal = tokens_of(inputs) == FATAL_TOKENS
        return (lambda: self._fail(finish(), fatal)) if fatal.any() else finish

    def _fail(self, logits: Logits, fatal: np.ndarray) -> Logits:
        if self._failure == "raises":
            raise RuntimeError("the engine failed on purpose")
        if self._failure == "few":
            # None at all: a packed batch has more answers than texts, so one less would do.
            return logits[:0]
        if self._failure == "slow":
            # In steps, as an engine works: a paused process continues where it stopped.
            for _ in range(SLOW_STEPS):
                time.sleep(0.01)
            return logits
        if self._failure == "stalls":
            threading.Event().wait()
        if self._failure == "breaks":
            raise EngineBroken("The engine broke on purpose; this replica will end.")
        spoiled = logits.copy()
        spoiled[fatal] = np.nan
        return spoiled


def tokens_of(inputs: Inputs) -> np.ndarray:
    """Return the token count of each text of a batch, (answers of the engine).

    In a packed batch the mask numbers the texts of a row.
    """
    mask = inputs["attention_mask"]
    if "first_tokens" not in inputs:
        return np.asarray(mask.sum(axis=1))
    texts = np.take_along_axis(mask, inputs["first_tokens"], axis=1)
    return np.asarray((mask[:, None, :] == texts[:, :, None]).sum(axis=2).reshape(-1))


if __name__ == "__main__":
    failure, *rest = sys.argv[1:]
    # `engine` imports the function by name. A KeyError here says that it has moved.
    real_load = vars(engine)["load"]
    vars(engine)["load"] = lambda *arguments: BrokenRuntime(real_load(*arguments), failure)
    sys.exit(main(rest))
