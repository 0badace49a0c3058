"""
The model that is pretrained: an unchanged BERT encoder, a decoder design, a tied output layer.

Parameter names are Hugging Face's (bert.*, cls.predictions.*) and pretraining_decoder.layer.*,
so a saved state dict is a Hugging Face checkpoint with the decoder beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from training.config import Config
from training.corpus import PAD
from training.decoders import build_decoder


class PredictionHead(nn.Module):
    """BERT's output layer; its matrix is the word embedding itself."""

    def __init__(self, hidden_size: int, vocabulary_size: int) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {"dense": nn.Linear(hidden_size, hidden_size), "LayerNorm": nn.LayerNorm(hidden_size, eps=1e-12)}
        )
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, state: Tensor, embeddings: Tensor) -> Tensor:
        """Scores (B, K, V) from states (B, K, D) and the embedding matrix (V, D)."""
        state = self.transform["LayerNorm"](F.gelu(self.transform["dense"](state)))
        return F.linear(state, embeddings, self.bias)


class PretrainingModel(nn.Module):
    def __init__(self, config: Config, vocabulary_size: int) -> None:
        super().__init__()
        shape, seed = config.encoder, config.optimisation.seed
        # The encoder and the head are drawn before the decoder and from their own seed:
        # twins that differ in the decoder alone begin with equal encoders.
        torch.manual_seed(seed)
        self.bert = BertModel(encoder_config(config, vocabulary_size), add_pooling_layer=False)
        self.cls = nn.ModuleDict({"predictions": PredictionHead(shape.hidden_size, vocabulary_size)})
        initialise(self.cls)
        torch.manual_seed(seed + 1)
        self.pretraining_decoder = build_decoder(config)
        initialise(self.pretraining_decoder)

    def forward(self, inputs: Tensor, positions: Tensor, generator: torch.Generator) -> Tensor:
        """Scores (B, K, V) at `positions` (B, K) of `inputs` (B, L)."""
        hidden = self.bert(input_ids=inputs).last_hidden_state                         # (B, L, D)
        state = self.pretraining_decoder(hidden, positions, generator)                 # (B, K, D)
        scores: Tensor = self.cls["predictions"](state, self.bert.embeddings.word_embeddings.weight)
        return scores


def initialise(module: nn.Module) -> None:
    """BERT's initialisation: normal(0, 0.02) matrices, zero biases, unit LayerNorms."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)


def encoder_config(config: Config, vocabulary_size: int) -> BertConfig:
    shape = config.encoder
    return BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=config.data.sequence_length,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        pad_token_id=PAD,
        attn_implementation="sdpa",
    )
