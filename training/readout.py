"""
Measures how well masked words can be read from an encoder's states, whatever it was trained with.

The encoder is frozen and its decoder left out. A new output layer of masked language modelling is
trained on its states for a few hundred steps, with the same first weights, text and masks for every
encoder. Its loss on held-out text compares designs whose own losses are of different kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.corpus import Corpus
from training.decoders import at
from training.frozen import FrozenEncoder
from training.losses import cross_entropy
from training.masking import MaskedBatch, mask_tokens
from training.model import PredictionHead, initialise
from training.pretrain import HELD_OUT_SEQUENCES, learning_rate
from training.rng import derive_seed


@dataclass(frozen=True)
class ReadOut:
    """How the output layer is trained; equal for all encoders that are compared."""

    steps: int = 400
    batch_size: int = 8
    """Sequences a step."""
    peak_learning_rate: float = 2e-3
    """The learning rate after the warm-up, from which it falls to zero."""
    warmup_steps: int = 40
    """Steps in which the learning rate rises."""
    mask_rate: float = 0.15
    """The share of a sequence's tokens to predict: BERT's."""
    seed: int = 0
    """Seed of the first weights, the text's order and the masks."""


def read_out_loss(encoder: FrozenEncoder, corpus: Corpus, recipe: ReadOut | None = None) -> float:
    """Return the held-out loss, in nats a masked token, of a new output layer on frozen states.

    Its matrix is the encoder's word embeddings, as in pretraining; they are frozen too. Everything
    is computed in fp32.
    """
    recipe = recipe or ReadOut()
    words = encoder.model.get_input_embeddings().weight
    torch.manual_seed(derive_seed(recipe.seed, "read-out"))
    head = PredictionHead(encoder.hidden_size, words.shape[1], words.shape[0])
    initialise(head)
    optimiser = torch.optim.AdamW(head.parameters(), lr=recipe.peak_learning_rate, eps=1e-6)
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, recipe)
        loss = _loss(encoder, head, words, _training_batch(corpus, recipe, step))
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
    head.eval()
    with torch.no_grad():
        losses = [
            (_loss(encoder, head, words, batch).item(), batch.targets.size)
            for batch in _held_out_batches(corpus, recipe)
        ]
    return float(np.average([loss for loss, _ in losses], weights=[size for _, size in losses]))


def _training_batch(corpus: Corpus, recipe: ReadOut, step: int) -> MaskedBatch:
    seed = derive_seed(recipe.seed, "read-out text")
    ids = corpus.batch(step, recipe.batch_size, seed)
    return mask_tokens(
        ids, recipe.mask_rate, corpus.vocabulary, np.random.default_rng([seed, step])
    )


def _held_out_batches(corpus: Corpus, recipe: ReadOut) -> list[MaskedBatch]:
    count = max(1, HELD_OUT_SEQUENCES // recipe.batch_size)
    return [
        mask_tokens(
            ids,
            recipe.mask_rate,
            corpus.vocabulary,
            np.random.default_rng([derive_seed(recipe.seed, "read-out held out"), number]),
        )
        for number, ids in enumerate(corpus.held_out_batches(recipe.batch_size, count))
    ]


def _loss(
    encoder: FrozenEncoder, head: PredictionHead, words: Tensor, batch: MaskedBatch
) -> Tensor:
    inputs, positions, targets = (
        torch.from_numpy(ids) for ids in (batch.inputs, batch.positions, batch.targets)
    )
    return cross_entropy(head(at(encoder.states(inputs), positions), words), targets)
