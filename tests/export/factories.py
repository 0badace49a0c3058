"""Writes a tiny BERT classifier with a pretraining decoder in its file, as training does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tests.factories import write_tokenizer
from training.decoders import TransformerBlock

HIDDEN = 32


def write_checkpoint(
    folder: Path,
    *,
    decoder: bool = True,
    seed: int = 0,
    fill: float | None = None,
    layers: int = 2,
    **changes: Any,
) -> Path:
    """Write a checkpoint to `folder` and return it; `changes` are fields of its config.

    Weights are random, or all have the value `fill`.
    """
    folder.mkdir(parents=True)
    write_tokenizer(folder / "tokenizer.json")
    config = BertConfig(
        vocab_size=12,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        problem_type="single_label_classification",
        **changes,
    )
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Scaled up, because parity would compare nothing but the near-zero logits of
            # initialisation.
            parameter.fill_(fill) if fill is not None else parameter.mul_(4)
    fields = config.to_dict() | {"architectures": ["BertForSequenceClassification"]}
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    if decoder:
        fields["pretraining_decoder"] = {"design": "drbert", "layers": 2}
        blocks = nn.ModuleDict(
            {"layer": nn.ModuleList(TransformerBlock(HIDDEN, 2, 64) for _ in range(2))}
        )
        tensors |= {
            f"pretraining_decoder.{name}": tensor.half()
            for name, tensor in blocks.state_dict().items()
        }
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors")
    return folder
