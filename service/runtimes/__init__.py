"""
Engines. A runtime is the only thing that knows one; the rest of the service sees arrays go in and
logits come out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from command import Unavailable
from service.batching.shapes import Grid

Inputs = Mapping[str, npt.NDArray[np.int64]]
Logits = npt.NDArray[np.float32]


class RuntimeUnavailable(Unavailable):
    """What was asked for cannot be run here, or would silently be something else."""


class Runtime(Protocol):
    """A compiled model on one device."""

    name: str
    device: str
    precision: str
    """What the engine says it computes in, read back after compiling."""
    computes_in: str
    """f32, bf16 or f16: the precision of what is not quantised."""
    flush_to_zero: bool
    """Whether subnormal numbers are taken for zero; without, a model full of them runs a hundred
    times slower.
    """
    in_flight: int
    """How many batches may be started before the first is waited for."""
    grid: Grid
    """The shapes it likes."""

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        """Begins a batch, (B, L) each input; the call returned waits for its logits, (B, labels).

        Where the grid packs, `position_ids`, (B, L), and `first_tokens`, (N), say where the B rows'
        texts are, and the logits are theirs, (N, labels); without these each row is a text.
        """
        ...
