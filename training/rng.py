"""
Where a run's randomness comes from: every use has a stream of its own, a function of the run's seed
and of what it is for.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def seed_of(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed; streams of other seeds, purposes and numbers do not overlap it."""
    state = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *numbers]).generate_state(
        1, np.uint64
    )[0]
    return int(state >> np.uint64(1))


def dice(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Dice for torch; they live on the CPU so that every device throws the same."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, *numbers))
