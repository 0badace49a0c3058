"""
DistilBERT's attention in BERT's form: the same sums and products, which the same patterns fuse.

transformers' form scales the queries instead of the scores, and writes a constant over padding
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
        """Return (B, L, D) for (B, L, D); `mask` (B, L) is 1 for a token and 0 for padding."""
        q, k, v = (self._split(x) for x in (self.q_lin(query), self.k_lin(key), self.v_lin(value)))
        padding = 1.0 - mask[:, None, None, :].to(query.dtype)  # (B, 1, 1, L)
        added = padding * torch.finfo(query.dtype).min
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.dim // self.n_heads)  # (B, n, L, L)
        weights = (scores + added).softmax(-1)
        context = (weights @ v).transpose(1, 2).contiguous()  # (B, L, n, d)
        return (self.out_lin(context.view(query.shape[0], -1, self.dim)),)

    def _split(self, x: Tensor) -> Tensor:
        """Return (B, n, L, d) for (B, L, D)."""
        # view, because ONNX Runtime's fusion finds its pattern by the constants of this reshape.
        return x.view(x.shape[0], -1, self.n_heads, self.dim // self.n_heads).transpose(1, 2)
