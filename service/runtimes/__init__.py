"""
Runtimes: each module here wraps one inference engine, and only it knows that engine.

The rest of the service passes arrays in and gets logits back.
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
    """Raised where a requested variant or engine cannot run here, or would silently be another."""


class Runtime(Protocol):
    """A compiled model on one device."""

    name: str
    """Name of the engine, such as openvino."""
    device: str
    """CPU, or the GPU's name and UUID."""
    precision: str
    """Precision of the variant: f32, bf16, f16 or i8."""
    computes_in: str
    """Precision of what is not quantized, read back from the engine: f32, bf16 or f16."""
    flush_to_zero: bool
    """Whether subnormal numbers count as zero. Otherwise a model full of them runs a hundred times
    slower.
    """
    graph_digest: str | None
    """Digest of the graph that is run, if it is not the exported one, whose digest the manifest
    holds: see service/runtimes/forms.py.
    """
    in_flight: int
    """Number of batches that may be started before the first one's logits are fetched."""
    grid: Grid
    """Shapes of batches that the engine runs fast."""

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        """Start a batch of inputs, each (B, L), and return a function that waits for its logits.

        The logits are (B, labels). Where the grid packs, `position_ids`, (B, L), and
        `first_tokens`, (B, Q), give the places of up to Q texts in each of the B rows, and the
        logits are (B × Q, labels). Without these two inputs, each row is one text. A model that
        labels tokens has no `first_tokens`, and its logits are (B, L, labels).
        """
        ...
