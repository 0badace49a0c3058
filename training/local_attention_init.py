"""
First weights by which an encoder attends to every word's neighbours from the first step on.

BERT's own attend to all positions alike. Here the first layer begins as a convolution: head by head
one to the left, one to the right, two to the left, … . Attention can be a convolution (arXiv
1911.03584), and trains better if it begins as one (ConViT, arXiv 2103.10697). No parameter is
added.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SCORE = 8.0
"""What a head adds to its neighbour's score at first: with 64 columns a head most of its attention
among 128 positions, less among more.
"""
GAIN = 0.7
"""Of the orthogonal value and output matrices; together they add half of what a neighbour holds to
what stands there.
"""


@torch.no_grad()
def initialise(encoder: PreTrainedModel) -> None:
    """Draws the positions and the first layer's attention anew; words, and all else, stay.

    Positions become sines and cosines of evenly spaced frequencies, as strong as the words. As many
    of them as there are columns are orthogonal to each other, and a step from one to the next turns
    every such pair by its own angle: so a query matrix that turns its pairs by δ steps finds the
    key δ positions on.
    """
    positions = encoder.embeddings.position_embeddings.weight  # (P, D)
    size, width = positions.shape
    turned = torch.arange(size)[:, None] * angles(width)  # (P, D/2)
    deviation = float(encoder.embeddings.word_embeddings.weight.std())
    positions.copy_(
        math.sqrt(2) * deviation * torch.stack([turned.sin(), turned.cos()], dim=-1).flatten(1)
    )
    attention = encoder.encoder.layer[0].attention
    initialise_attention(attention, attention.self.num_attention_heads)


@torch.no_grad()
def initialise_attention(attention: Any, heads: int, score: float = SCORE) -> None:
    """Draws the matrices of a BERT layer's attention so that each head attends to one neighbour.

    `score` is what the neighbour's is, where a third of a state's variance is its position.
    """
    query, key, value, output = (
        attention.self.query,
        attention.self.key,
        attention.self.value,
        attention.output.dense,
    )
    width = query.in_features
    # What the first layer reads is word, segment and position, all alike: the position has 1/3 a
    # column.
    scale = math.sqrt(3 * score / math.sqrt(width // heads))
    pairs = torch.randperm(width // 2).view(heads, -1)  # (H, d/2), each head's own
    query.weight.copy_(
        scale * torch.cat([turning(own, offset(head), width) for head, own in enumerate(pairs)])
    )
    key.weight.copy_(scale * torch.cat([turning(own, 0, width) for own in pairs]))
    for linear in (value, output):
        nn.init.orthogonal_(linear.weight, GAIN)


def angles(width: int) -> Tensor:
    """(D/2) By which the pairs of columns turn from one position to the next."""
    return math.pi * (torch.arange(width // 2) + 0.5) / (width // 2)


def offset(head: int) -> int:
    """-1, 1, -2, 2, -3, …: which neighbour a head looks at, in tokens."""
    return (head // 2 + 1) * (-1 if head % 2 == 0 else 1)


def turning(pairs: Tensor, steps: int, width: int) -> Tensor:
    """(d, D) The matrix that reads the given pairs (d/2) of D columns, turned by as many steps."""
    matrix = torch.zeros(len(pairs), 2, width // 2, 2)
    rows, turn = torch.arange(len(pairs)), steps * angles(width)[pairs]
    matrix[rows, 0, pairs, 0] = matrix[rows, 1, pairs, 1] = turn.cos()
    matrix[rows, 0, pairs, 1] = turn.sin()
    matrix[rows, 1, pairs, 0] = -turn.sin()
    return matrix.view(2 * len(pairs), width)
