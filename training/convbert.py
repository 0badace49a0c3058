"""
ConvBERT's mixed attention (arXiv 2008.02496), as it is meant to be trained.

transformers' module is kept for its parameters and names; what it computes is computed here,
because there

* the convolution sees through the padding mask, so that a text's answer depends on its neighbours'
  length,
* the values are copied k times (unfold) where k shifted multiply-adds do,
* a depthwise kernel begins with a deviation of 0.02 where the authors' code has 1/k.

On a text without padding both compute the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConvBertConfig, ConvBertModel
from transformers.models.convbert.modeling_convbert import ConvBertSelfAttention, GroupedLinearLayer

from training.attention import attention


class MixedAttention(ConvBertSelfAttention):  # type: ignore[misc]
    """Self-attention beside a span-based dynamic convolution, on half of the heads each.

    SDConv(Q, Ks, V)_i = Σ_j softmax_j(W (Q_i ⊙ Ks_i))_j · V_{i + j − (k+1)/2}     Ks: separable
        convolution of the input
    output             = concat(softmax(QKᵀ/√d) V, SDConv(Q, Ks, V'))              §3, eq. 5 to
        8
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: object, **__: object
    ) -> tuple[Tensor, None]:
        """(B, L, D) from (B, L, D); `attention_mask` (B, 1, 1 or L, L) is added to the scores, or
        True where one may look.
        """
        heads, width = self.num_attention_heads, self.attention_head_size  # n, d: n·d = D/2
        q, k, v = (
            self._split(layer(hidden_states)) for layer in (self.query, self.key, self.value)
        )
        dropout = self.dropout.p if self.training else 0.0
        seen = attention(q, k, v, attention_mask, dropout).transpose(1, 2)  # (B, L, n, d)

        kept = _kept(attention_mask, hidden_states.dtype)  # (B, L, 1)
        spans = self.key_conv_attn_layer((hidden_states * kept).transpose(1, 2)).transpose(
            1, 2
        )  # (B, L, n·d)
        kernels = self.conv_kernel_layer(spans * q.transpose(1, 2).flatten(2))
        kernels = kernels.unflatten(2, (heads, self.conv_kernel_size)).softmax(-1)  # (B, L, n, k)
        values = (self.conv_out_layer(hidden_states) * kept).unflatten(2, (heads, width))
        return torch.cat([seen, convolve(values, kernels)], dim=2).flatten(2), None

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_attention_heads, self.attention_head_size).transpose(
            1, 2
        )  # (B, n, L, d)


def convolve(values: Tensor, kernels: Tensor) -> Tensor:
    """Every position's own kernel (B, L, n, k) over its neighbourhood in `values` (B, L, n, d);
    zeros beyond the ends.
    """
    length, span = values.shape[1], kernels.shape[3]
    padded = F.pad(values, (0, 0, 0, 0, span // 2, span // 2))  # (B, L + k − 1, n, d)
    mixed = padded[:, :length] * kernels[..., :1]
    for shift in range(1, span):
        mixed = mixed + padded[:, shift : shift + length] * kernels[..., shift, None]
    return mixed  # (B, L, n, d)


def _kept(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    """1 where a token stands, 0 where padding does, (B, L, 1), out of the mask that the layers are
    handed.
    """
    if attention_mask is None:
        return 1.0
    row = attention_mask[:, 0, 0]  # (B, L)
    return (row if row.dtype == torch.bool else row == 0)[..., None].to(dtype)


def mend(model: ConvBertModel) -> ConvBertModel:
    """Puts MixedAttention in the place of every layer's attention; the parameters stay."""
    for layer in model.encoder.layer:
        theirs = layer.attention.self
        ours = MixedAttention(model.config).to(theirs.query.weight)
        ours.load_state_dict(theirs.state_dict())
        layer.attention.self = ours.train(theirs.training)
    return model


def initialise(model: ConvBertModel, config: ConvBertConfig) -> None:
    """Draws what transformers draws otherwise than the authors' code, or, in some versions, not at
    all.
    """
    for part in model.modules():
        if isinstance(part, GroupedLinearLayer):
            nn.init.normal_(part.weight, std=config.initializer_range)
            nn.init.zeros_(part.bias)
        if isinstance(part, ConvBertSelfAttention):
            nn.init.normal_(
                part.key_conv_attn_layer.depthwise.weight, std=1 / config.conv_kernel_size
            )
