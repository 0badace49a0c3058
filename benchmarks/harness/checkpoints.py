"""
Classifiers with random weights, as Hugging Face folders: the subjects of benchmarks whose time
depends on no weight.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

TOKENIZER = Path("examples/checkpoints/bert-mini-sst2/tokenizer.json")
SIZES = {
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
    folder: Path, size: str, seed: int, positions: int = 128, **changes: float
) -> Path:
    """A Hugging Face folder with a classifier of that size that reads `positions` tokens, its
    weights drawn from `seed`; `changes` are to its config.
    """
    folder.mkdir(parents=True)
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    # The length limit is told: without, other servers warm up with more tokens than the model
    # reads.
    told = json.loads(TOKENIZER.with_name("tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(told | {"model_max_length": positions})
    )
    vocabulary = json.loads(TOKENIZER.read_text())["model"]["vocab"]
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary),
            max_position_embeddings=positions,
            id2label={0: "NEGATIVE", 1: "POSITIVE"},
            problem_type="single_label_classification",
            **(SIZES[size] | changes),
        )
    )
    (folder / "config.json").write_text(
        json.dumps(model.config.to_dict() | {"architectures": ["BertForSequenceClassification"]})
    )
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
