"""
ConvBERT's mixed attention in a padding-invariant form that engines run faster.

transformers' form (arXiv 2008.02496, §3) copies the values k times (unfold) and convolves over
padding, so an answer depends on the length of the other texts in its batch. Here the kernel of each
position is a row of a band matrix:

    convolution = band · V',   band[i, i + j − (k−1)/2] = kernel[i, j]

This is a matrix product, as in attention itself. It needs L/k times the multiplications of a sum of
k shifted products, a few per cent of a layer's, but is faster than that sum because it moves the
values once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.convbert.modeling_convbert import ConvBertSelfAttention


class BandAttention(ConvBertSelfAttention):  # type: ignore[misc]
    """Self-attention on half of the heads, span-based dynamic convolution on the others.

    The convolution is a product with a band matrix.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: object, **__: object
    ) -> tuple[Tensor, None]:
        """Return (B, L, D) for (B, L, D).

        `attention_mask` (B, 1, 1, L) is added to the scores; it is 0 for a token.
        """
        queries = self.query(hidden_states)
        q, k, v = (
            self._split(x) for x in (queries, self.key(hidden_states), self.value(hidden_states))
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.attention_head_size)  # (B, n, L, L)
        tokens: Tensor | float = 1.0  # (B, L, 1): 1 for a token, 0 for padding
        if attention_mask is not None:
            scores = scores + attention_mask
            tokens = (attention_mask[:, 0, 0] == 0)[..., None].to(hidden_states.dtype)

        unpadded = (hidden_states * tokens).transpose(1, 2)  # (B, D, L)
        spans = self.key_conv_attn_layer(unpadded).transpose(1, 2)  # (B, L, n·d)
        kernels = self.conv_kernel_layer(spans * queries)
        kernels = _unflatten(kernels, 2, self.num_attention_heads, self.conv_kernel_size)
        kernels = kernels.softmax(-1)  # (B, L, n, k)
        convolved = band(kernels.transpose(1, 2), hidden_states.shape[1]) @ self._split(
            self.conv_out_layer(hidden_states) * tokens
        )
        mixed = torch.cat(
            [(scores.softmax(-1) @ v).transpose(1, 2), convolved.transpose(1, 2)], dim=2
        )
        return mixed.flatten(2), None  # (B, L, 2·n·d)

    def _split(self, x: Tensor) -> Tensor:
        """Return (B, n, L, d) for (B, L, n·d)."""
        heads = _unflatten(x, 2, self.num_attention_heads, self.attention_head_size)
        return heads.transpose(1, 2)


def band(kernels: Tensor, length: int) -> Tensor:
    """Return (B, n, L, L): the kernel of each position, (B, n, L, k), along the diagonal.

    Kernels are cut off at both ends of the text. Rows padded to L + k and read again as rows of
    L + k − 1 are each shifted by one more. `length` must be L as the caller's own input has it:
    taken from the kernels, a tracer would fix it at the traced length.
    """
    span = kernels.shape[3]
    shifted = F.pad(kernels, (0, length)).flatten(2)[:, :, : length * (length + span - 1)]
    return _unflatten(shifted, 2, length, length + span - 1)[..., span // 2 : span // 2 + length]


def _unflatten(x: Tensor, axis: int, *sizes: int) -> Tensor:
    result: Tensor = x.unflatten(axis, sizes)  # type: ignore[no-untyped-call]
    return result
