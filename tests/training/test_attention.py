"""The written-out attention computes what torch's computes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.attention import attention

MAY_ATTEND = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.6
MAY_ATTEND[..., 0] = True


@pytest.mark.parametrize(
    "mask",
    [None, MAY_ATTEND, torch.zeros(MAY_ATTEND.shape).masked_fill(~MAY_ATTEND, -math.inf)],
    ids=["without", "boolean", "added"],
)
def test_the_products_and_their_gradients_are_those_of_torchs_attention(
    mask: Tensor | None,
) -> None:
    rng = torch.Generator().manual_seed(1)
    q, k, v, gradient = (
        torch.randn(2, 4, length, 8, generator=rng, requires_grad=True) for length in (5, 7, 7, 5)
    )
    computed, expected = attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(computed, expected)
    torch.testing.assert_close(
        torch.autograd.grad(computed, [q, k, v], gradient),
        torch.autograd.grad(expected, [q, k, v], gradient),
    )


def test_dropout_leaves_out_whole_keys_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    q, k, v = torch.zeros(1, 1, 2000, 4), torch.zeros(1, 1, 4, 4), torch.eye(4)[None, None]
    weights = attention(q, k, v, dropout=0.25)  # each key's weight, 1/4 or 0
    torch.testing.assert_close(weights, torch.where(weights > 0, 1 / 3, 0.0))
    assert abs(float((weights == 0).float().mean()) - 0.25) < 0.02
