"""
Random streams of a run: every use has one of its own, a function of the run's seed and its purpose.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed; other seeds, purposes or numbers give streams that do not overlap."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *numbers])
    state = sequence.generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


def make_rng(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a generator for torch, on the CPU so that every device draws the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *numbers))
