"""
Two classifiers of BERT-base's size with random weights, exported: twins for a proof at that size.

    python -m benchmarks random_twins artifacts/random-base

Time depends on the graph and not on what the weights say, so random ones stand in for trained ones;
subnormal numbers, the one way in which weights could matter, are counted and said.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from command import Parser
from export.commands import export
from proof import identity

TOKENIZER = Path("examples/checkpoints/bert-mini-sst2/tokenizer.json")
SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks random_twins", description="Export two classifiers with random weights.")
    parser.add_argument("out", type=Path, help="the folder for the artifacts bert and drbert")
    parser.add_argument("--size", choices=tuple(SIZES), default="base")
    given = parser.parse_args(arguments)
    for seed, name in enumerate(("bert", "drbert")):
        with tempfile.TemporaryDirectory() as temporary:
            export(str(write_checkpoint(Path(temporary) / name, given.size, seed)), given.out / name, variants=("cpu-fp32",))
    compared = identity.compare(given.out / "bert", given.out / "drbert")
    print(identity.describe(compared))
    return 0 if compared["same"] else 1


def write_checkpoint(folder: Path, size: str, seed: int) -> Path:
    """A Hugging Face folder with a classifier of that size and weights drawn from `seed`."""
    folder.mkdir(parents=True)
    # Its length limit too: without, other servers warm up with more tokens than the model reads.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER.with_name(name), folder / name)
    vocabulary = json.loads(TOKENIZER.read_text())["model"]["vocab"]
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(vocabulary), max_position_embeddings=128, id2label={0: "NEGATIVE", 1: "POSITIVE"},
        problem_type="single_label_classification", **SIZES[size],
    ))
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"architectures": ["BertForSequenceClassification"]}))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
