"""
Corrects transformers' ConvBERT: mixed attention (arXiv 2008.02496) as its authors train it.

transformers' module keeps its parameters and their names, but the computation is replaced. There

* the convolution ignores the padding mask, so a text's answer depends on the length of the other
  texts in its batch,
* the values are copied k times (unfold), where k shifted multiply-adds do,
* a depthwise kernel begins with a deviation of 0.02, where the authors' code has 1/k.

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
    """Self-attention and span-based dynamic convolution, on half of the heads each.

    SDConv(Q, Ks, V)_i = Σ_j softmax_j(W (Q_i ⊙ Ks_i))_j · V_{i + j − (k+1)/2}     Ks: separable
        convolution of the input
    output             = concat(softmax(QKᵀ/√d) V, SDConv(Q, Ks, V'))              §3, eq. 5 to
        8
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: object, **__: object
    ) -> tuple[Tensor, None]:
        """Return the mixed attention (B, L, D) of hidden states (B, L, D).

        `attention_mask` (B, 1, 1 or L, L) is boolean, True where a query may attend, or is added
        to the scores.
        """
        heads, width = self.num_attention_heads, self.attention_head_size  # n, d: n·d = D/2
        q, k, v = (
            self._split(layer(hidden_states)) for layer in (self.query, self.key, self.value)
        )
        dropout = self.dropout.p if self.training else 0.0
        attended = attention(q, k, v, attention_mask, dropout).transpose(1, 2)  # (B, L, n, d)

        is_token = _token_mask(attention_mask, hidden_states.dtype)  # (B, L, 1)
        tokens = (hidden_states * is_token).transpose(1, 2)  # (B, D, L)
        spans = self.key_conv_attn_layer(tokens).transpose(1, 2)  # (B, L, n·d)
        kernels = self.conv_kernel_layer(spans * q.transpose(1, 2).flatten(2))
        kernels = kernels.unflatten(2, (heads, self.conv_kernel_size)).softmax(-1)  # (B, L, n, k)
        values = (self.conv_out_layer(hidden_states) * is_token).unflatten(2, (heads, width))
        return torch.cat([attended, convolve(values, kernels)], dim=2).flatten(2), None

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_attention_heads, self.attention_head_size).transpose(
            1, 2
        )  # (B, n, L, d)


def convolve(values: Tensor, kernels: Tensor) -> Tensor:
    """Return the convolution (B, L, n, d) of `values` (B, L, n, d) with a kernel a position.

    `kernels` is (B, L, n, k); values beyond the ends are 0.
    """
    length, span = values.shape[1], kernels.shape[3]
    padded = F.pad(values, (0, 0, 0, 0, span // 2, span // 2))  # (B, L + k − 1, n, d)
    mixed = padded[:, :length] * kernels[..., :1]
    for shift in range(1, span):
        mixed = mixed + padded[:, shift : shift + length] * kernels[..., shift, None]
    return mixed  # (B, L, n, d)


def _token_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    """Return 1 for tokens and 0 for padding, (B, L, 1), from the mask that the layers receive."""
    if attention_mask is None:
        return 1.0
    row = attention_mask[:, 0, 0]  # (B, L)
    is_token = row if row.dtype == torch.bool else row == 0
    return is_token[..., None].to(dtype)


def patch_attention(model: ConvBertModel) -> ConvBertModel:
    """Replace every layer's attention by MixedAttention with the same parameters."""
    for layer in model.encoder.layer:
        original = layer.attention.self
        mixed = MixedAttention(model.config).to(original.query.weight)
        mixed.load_state_dict(original.state_dict())
        layer.attention.self = mixed.train(original.training)
    return model


def initialise(model: ConvBertModel, config: ConvBertConfig) -> None:
    """Draw the weights that transformers draws unlike the authors' code, or does not draw.

    Some versions of transformers leave grouped layers as they were allocated.
    """
    for part in model.modules():
        if isinstance(part, GroupedLinearLayer):
            nn.init.normal_(part.weight, std=config.initializer_range)
            nn.init.zeros_(part.bias)
        if isinstance(part, ConvBertSelfAttention):
            nn.init.normal_(
                part.key_conv_attn_layer.depthwise.weight, std=1 / config.conv_kernel_size
            )
