"""
Classifiers with random weights, as Hugging Face checkpoints, for benchmarks whose time does not
depend on the weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

TOKENIZER = Path("examples/checkpoints/bert-mini-sst2/tokenizer.json")
CLASSES = ("NEGATIVE", "POSITIVE")
SIZES = {
    "mini": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
}


def write_checkpoint(
    folder: Path,
    size: str,
    seed: int,
    positions: int = 128,
    labels: Sequence[str] = CLASSES,
    **changes: float,
) -> Path:
    """Write a classifier with random weights to the new folder `folder` and return that folder.

    `size` is a key of SIZES, `positions` the longest text in tokens, `seed` the seed of the
    weights. With one label it is a cross-encoder, for pairs. `changes` override entries of the
    model's config.
    """
    folder.mkdir(parents=True)
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    # Without a length limit, other servers warm up with more tokens than the model reads.
    tokenizer_config = json.loads(TOKENIZER.with_name("tokenizer_config.json").read_text())
    tokenizer_config["model_max_length"] = positions
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    vocabulary = json.loads(TOKENIZER.read_text())["model"]["vocab"]
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary),
            max_position_embeddings=positions,
            id2label=dict(enumerate(labels)),
            # transformers 5 refuses it for one label.
            problem_type="single_label_classification" if len(labels) > 1 else None,
            **(SIZES[size] | changes),
        )
    )
    config = model.config.to_dict() | {"architectures": ["BertForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
