"""
Initialises an encoder so that it attends to each token's neighbours from the first step on.

BERT's own initialisation attends to all positions alike. Here the first layer begins as a
convolution: the first head attends to the token on the left, the second to the one on the right,
the third to the second on the left, and so on. Attention can be a convolution (arXiv 1911.03584),
and trains better if it begins as one (ConViT, arXiv 2103.10697). No parameter is added.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SCORE = 8.0
"""What a head first adds to its neighbour's attention score. With 64 columns a head that is most of
its attention among 128 positions, and less among more.
"""
GAIN = 0.7
"""Gain of the orthogonal value and output matrices. Together they add half of the neighbour's state
to a token's.
"""


@torch.no_grad()
def initialise(encoder: PreTrainedModel) -> None:
    """Draw the position embeddings and the first layer's attention anew; all else stays.

    Positions become sines and cosines of evenly spaced frequencies, with the deviation of the word
    embeddings. As many positions as there are columns are orthogonal to each other. A step from one
    position to the next rotates every sine-cosine pair by its own angle. So a query matrix that
    rotates its pairs by δ steps matches the key δ positions on.
    """
    positions = encoder.embeddings.position_embeddings.weight  # (P, D)
    size, width = positions.shape
    phases = torch.arange(size)[:, None] * angles(width)  # (P, D/2)
    waves = torch.stack([phases.sin(), phases.cos()], dim=-1).flatten(1)  # (P, D)
    deviation = float(encoder.embeddings.word_embeddings.weight.std())
    positions.copy_(math.sqrt(2) * deviation * waves)
    attention = encoder.encoder.layer[0].attention
    initialise_attention(attention, attention.self.num_attention_heads)


@torch.no_grad()
def initialise_attention(attention: Any, heads: int, score: float = SCORE) -> None:
    """Draw the matrices of a BERT layer's attention so that each head attends to one neighbour.

    The neighbour's score is `score` where a third of a state's variance is its position.
    """
    query, key = attention.self.query, attention.self.key
    width = query.in_features
    # The first layer reads the sum of word, segment and position, each with the same variance: the
    # position has 1/3 of a column's.
    scale = math.sqrt(3 * score / math.sqrt(width // heads))
    pairs_by_head = torch.randperm(width // 2).view(heads, -1)  # (H, d/2)
    queries = [rotation(pairs, offset(head), width) for head, pairs in enumerate(pairs_by_head)]
    keys = [rotation(pairs, 0, width) for pairs in pairs_by_head]
    query.weight.copy_(scale * torch.cat(queries))
    key.weight.copy_(scale * torch.cat(keys))
    for linear in (attention.self.value, attention.output.dense):
        nn.init.orthogonal_(linear.weight, GAIN)


def angles(width: int) -> Tensor:
    """Return the angles (D/2) by which pairs of columns rotate from one position to the next."""
    return math.pi * (torch.arange(width // 2) + 0.5) / (width // 2)


def offset(head: int) -> int:
    """Return which neighbour a head attends to, in tokens: -1, 1, -2, 2, -3 and so on."""
    return (head // 2 + 1) * (-1 if head % 2 == 0 else 1)


def rotation(pairs: Tensor, steps: int, width: int) -> Tensor:
    """Return the matrix (d, D) that reads some pairs (d/2) of D columns, rotated by `steps`."""
    matrix = torch.zeros(len(pairs), 2, width // 2, 2)
    rows, angle = torch.arange(len(pairs)), steps * angles(width)[pairs]
    matrix[rows, 0, pairs, 0] = matrix[rows, 1, pairs, 1] = angle.cos()
    matrix[rows, 0, pairs, 1] = angle.sin()
    matrix[rows, 1, pairs, 0] = -angle.sin()
    return matrix.view(2 * len(pairs), width)
