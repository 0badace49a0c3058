"""
DistilBERT's attention in BERT's form: the same sums and products, so that what fuses BERT's fuses
this one's too.

The original scales the queries instead of the scores, and writes a constant where there is padding
instead of adding it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers.models.distilbert.modeling_distilbert import MultiHeadSelfAttention


class AddedMaskAttention(MultiHeadSelfAttention):  # type: ignore[misc]
    """Self-attention whose mask is added to the scores, as BERT's is."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """(B, L, D) from (B, L, D); `mask` (B, L) is 1 where a token stands and 0 where there is
        padding.
        """
        q, k, v = (self._split(x) for x in (self.q_lin(query), self.k_lin(key), self.v_lin(value)))
        added = (1.0 - mask[:, None, None, :].to(query.dtype)) * torch.finfo(
            query.dtype
        ).min  # (B, 1, 1, L)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(self.dim // self.n_heads) + added).softmax(
            -1
        )  # (B, n, L, L)
        seen = (
            (weights @ v).transpose(1, 2).contiguous().view(query.shape[0], -1, self.dim)
        )  # (B, L, D)
        return (self.out_lin(seen),)

    def _split(self, x: Tensor) -> Tensor:
        # view, for the pattern is known by the constants of its reshape.
        return x.view(x.shape[0], -1, self.n_heads, self.dim // self.n_heads).transpose(
            1, 2
        )  # (B, n, L, d)
