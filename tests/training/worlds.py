"""A small corpus, a small task and a config that trains on them in a second."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

from training.config import Config, read_config

WORDS = ("the", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "slept", "all", "day", "in", "sun")


def write_text(folder: Path, documents: int = 40) -> Path:
    rng = random.Random(1)
    folder.mkdir(parents=True)
    for name in ("shard", "held"):
        text = "\n\n".join(" ".join(rng.choices(WORDS, k=80)) for _ in range(documents))
        with gzip.open(folder / f"{name}.txt.gz", "wt") as file:
            file.write(text)
    return folder


def write_task(folder: Path) -> Path:
    (folder / "sst2").mkdir(parents=True)
    rows = [("the cat slept in the warm sun", 1), ("the dog ran under the tree", 0)] * 32
    for split in ("train", "dev"):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (folder / "sst2" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_config(path: Path, design: str = "drbert", steps: int = 12, dropout: float = 0.1) -> Config:
    layers = 0 if design == "none" else 2
    path.write_text(f"""
[data]
text = ["shard.txt.gz"]
held_out = ["held.txt.gz"]
vocabulary_size = 80
sequence_length = 32
[encoder]
layers = 2
hidden_size = 32
heads = 2
intermediate_size = 64
dropout = {dropout}
[decoder]
design = "{design}"
layers = {layers}
unmasked_first = 0.5
decoder_share = 0.5
[optimisation]
steps = {steps}
batch_size = 4
peak_learning_rate = 3e-3
warmup_steps = 2
checkpoint_every = 4
precision = "fp32"
seed = 5
""")
    return read_config(path)
