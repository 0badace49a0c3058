"""
Softmax attention over heads, by whatever is fastest to train with.

torch's fused kernel is, on a GPU. On a CPU its backward pass takes twice to three times as long as
the products written out, in bf16 at 128 tokens; in fp32 they are level (AMD EPYC, torch 2.13, by
hand).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(QKᵀ/√d) V (B, H, Q, d) of queries (B, H, Q, d) on keys and values (B, H, L, d).

    `mask` (broadcast to B, H, Q, L) is True where a query may look, or is added to the scores.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)  # (B, H, Q, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    shares = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(shares, dropout) @ v


def transformers_name() -> str:
    """The same choice by transformers' name for it, `attn_implementation`."""
    return "sdpa" if torch.cuda.is_available() else "eager"
