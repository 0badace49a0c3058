"""
ConvBERT's mixed attention in the form in which engines run it fastest, and deaf to padding.

transformers' own (arXiv 2008.02496, §3) copies the values k times (unfold) and convolves over
padding, so that an answer depends on how long its neighbours are. Here every position's kernel
becomes a row of a band matrix:

    convolution = band · V',   band[i, i + j − (k−1)/2] = kernel[i, j]

which is a matrix product as attention's own is. It does L/k times the multiplications that a sum of
k shifted products would do, a few per cent of a layer's, and is quicker than that sum: it moves the
values once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.convbert.modeling_convbert import ConvBertSelfAttention


class BandAttention(ConvBertSelfAttention):  # type: ignore[misc]
    """Self-attention on half of the heads, span-based dynamic convolution as a band matrix on the
    others.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: object, **__: object
    ) -> tuple[Tensor, None]:
        """(B, L, D) from (B, L, D); `attention_mask` (B, 1, 1, L) is added to the scores: 0 where a
        token stands.
        """
        queries = self.query(hidden_states)
        q, k, v = (
            self._split(x) for x in (queries, self.key(hidden_states), self.value(hidden_states))
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.attention_head_size)  # (B, n, L, L)
        kept: Tensor | float = 1.0
        if attention_mask is not None:
            scores = scores + attention_mask
            kept = (attention_mask[:, 0, 0] == 0)[..., None].to(hidden_states.dtype)  # (B, L, 1)

        spans = self.key_conv_attn_layer((hidden_states * kept).transpose(1, 2)).transpose(
            1, 2
        )  # (B, L, n·d)
        kernels = self.conv_kernel_layer(spans * queries)
        kernels = _parted(kernels, 2, self.num_attention_heads, self.conv_kernel_size).softmax(
            -1
        )  # (B, L, n, k)
        convolved = band(kernels.transpose(1, 2), hidden_states.shape[1]) @ self._split(
            self.conv_out_layer(hidden_states) * kept
        )
        mixed = torch.cat(
            [(scores.softmax(-1) @ v).transpose(1, 2), convolved.transpose(1, 2)], dim=2
        )
        return mixed.flatten(2), None  # (B, L, 2·n·d)

    def _split(self, x: Tensor) -> Tensor:
        return _parted(x, 2, self.num_attention_heads, self.attention_head_size).transpose(
            1, 2
        )  # (B, n, L, d)


def band(kernels: Tensor, length: int) -> Tensor:
    """(B, n, L, L): each position's kernel (B, n, L, k) along the diagonal, cut off at both ends.

    Rows padded to L + k and read again as rows of L + k − 1 are shifted by one each. `length` is L
    as the caller's own input has it: asked of the kernels, a tracer takes the one it saw for the
    only one.
    """
    span = kernels.shape[3]
    shifted = F.pad(kernels, (0, length)).flatten(2)[:, :, : length * (length + span - 1)]
    return _parted(shifted, 2, length, length + span - 1)[..., span // 2 : span // 2 + length]


def _parted(x: Tensor, axis: int, *extents: int) -> Tensor:
    result: Tensor = x.unflatten(axis, extents)  # type: ignore[no-untyped-call]
    return result
