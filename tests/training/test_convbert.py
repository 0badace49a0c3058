"""The patched ConvBERT computes the paper's formulas and is padding-invariant."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ConvBertConfig, ConvBertModel

from training import convbert


def config(**changes: object) -> ConvBertConfig:
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "embedding_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "conv_kernel_size": 5,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return ConvBertConfig(**{**shape, **changes})


def small(**changes: object) -> ConvBertModel:
    torch.manual_seed(0)
    return ConvBertModel(config(**changes)).eval()


def by_the_papers_formulas(attention: Any, x: Tensor) -> Tensor:
    """Mixed attention, word by word: arXiv 2008.02496, equations 5 to 8; x (L, D)."""
    length, n, d, k = (
        len(x),
        attention.num_attention_heads,
        attention.attention_head_size,
        attention.conv_kernel_size,
    )
    q, key, v, out = (
        getattr(attention, name)(x).view(length, n, d)
        for name in ("query", "key", "value", "conv_out_layer")
    )
    separable = attention.key_conv_attn_layer
    rows = []
    for i in range(length):
        span = torch.zeros(x.shape[1])
        for j in range(k):
            if 0 <= (place := i + j - k // 2) < length:
                span += separable.depthwise.weight[:, 0, j] * x[place]
        ks = (separable.pointwise.weight[:, :, 0] @ span + separable.bias[:, 0]).view(n, d)
        kernel = attention.conv_kernel_layer((q[i] * ks).flatten()).view(n, k).softmax(-1)
        heads = []
        for h in range(n):
            weights = torch.stack(
                [q[i, h] @ key[j, h] / math.sqrt(d) for j in range(length)]
            ).softmax(0)
            heads.append(sum(weights[j] * v[j, h] for j in range(length)))
        for h in range(n):
            heads.append(
                sum(
                    kernel[h, j] * out[i + j - k // 2, h]
                    for j in range(k)
                    if 0 <= i + j - k // 2 < length
                )
            )
        rows.append(torch.cat(heads))
    return torch.stack(rows)


@torch.no_grad()
def test_mixed_attention_is_what_the_paper_writes() -> None:
    attention = convbert.patch_attention(small()).encoder.layer[0].attention.self
    x = torch.randn(7, 16)
    assert torch.allclose(attention(x[None])[0][0], by_the_papers_formulas(attention, x), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_a_text_without_padding_gets_what_transformers_computes(groups: int) -> None:
    original, patched = small(num_groups=groups), convbert.patch_attention(small(num_groups=groups))
    ids = torch.randint(1, 50, (3, 11))
    for mask in (None, torch.ones_like(ids)):
        assert torch.allclose(
            patched(ids, mask).last_hidden_state, original(ids, mask).last_hidden_state, atol=1e-5
        )


@torch.no_grad()
def test_padding_changes_the_original_but_not_the_patched_model() -> None:
    original, patched = small(), convbert.patch_attention(small())
    ids = torch.randint(1, 50, (1, 9))
    padded, mask = (
        torch.nn.functional.pad(ids, (0, 5)),
        torch.nn.functional.pad(torch.ones_like(ids), (0, 5)),
    )
    alone, in_batch = (
        patched(x, m).last_hidden_state[:, :9]
        for x, m in ((ids, torch.ones_like(ids)), (padded, mask))
    )
    assert torch.allclose(alone, in_batch, atol=1e-5)
    alone, in_batch = (
        original(x, m).last_hidden_state[:, :9]
        for x, m in ((ids, torch.ones_like(ids)), (padded, mask))
    )
    assert not torch.allclose(alone, in_batch, atol=1e-3)


def test_gradients_reach_every_parameter() -> None:
    model = convbert.patch_attention(small())
    model(torch.randint(1, 50, (2, 9))).last_hidden_state.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_depthwise_kernels_begin_as_the_authors_do() -> None:
    described = config(hidden_size=512, num_groups=2, conv_kernel_size=9, initializer_range=0.02)
    model = ConvBertModel(described)
    for part in model.modules():
        if hasattr(part, "group_in_dim"):
            torch.nn.init.constant_(part.weight, 7.0)  # as if it had never been drawn
    convbert.initialise(model, described)
    layer = model.encoder.layer[0]
    assert layer.attention.self.key_conv_attn_layer.depthwise.weight.std().item() == pytest.approx(
        1 / 9, rel=0.1
    )
    assert layer.intermediate.dense.weight.std().item() == pytest.approx(0.02, rel=0.1)
