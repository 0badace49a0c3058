"""What models are trained to lower."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Losses = dict[str, Tensor]
"""The total as "loss", and its parts by name if it has more than one."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of logits (B, K, V) against targets (B, K)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
