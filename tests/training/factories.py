"""Makes a small corpus, small tasks, and configs that train on them in seconds."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models

from training.config import Config, read_config
from training.vocabulary import SPECIAL_TOKENS, Vocabulary

CONFIGS = Path("training/configs").resolve()
TEXT = Path("tests/data/text").resolve()
TINY = sorted(path.stem for path in CONFIGS.glob("tiny-*.toml"))
WORDS = (
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "tree",
    "and",
    "then",
    "slept",
    "all",
    "day",
    "in",
    "sun",
)


def tiny(name: str, path: Path, changes: str = "") -> Config:
    """Return the config training/configs/tiny-<name>.toml with `changes`, written to `path`."""
    path.write_text(f'extends = "{CONFIGS / f"tiny-{name}.toml"}"\n{changes}\n')
    return read_config(path)


def write_text(folder: Path, documents: int = 40) -> Path:
    """Write shards with the names that the tiny configs have."""
    rng = random.Random(1)
    folder.mkdir(parents=True)
    for name in ("book-0", "book-1"):
        text = "\n\n".join(" ".join(rng.choices(WORDS, k=80)) for _ in range(documents))
        with gzip.open(folder / f"{name}.txt.gz", "wt") as file:
            file.write(text)
    return folder


def write_task(folder: Path) -> Path:
    """Write SST-2 and STS-B with examples that are learned in a second."""
    rows = [("the cat slept in the warm sun", 1), ("the dog ran under the tree", 0)] * 32
    pairs = [("the cat slept", "the cat slept", 5.0), ("the cat slept", "a dog ran", 0.5)] * 32
    for name, header, lines in (
        ("sst2", "sentence\tlabel", [f"{text}\t{label}" for text, label in rows]),
        (
            "stsb",
            "index\tsentence1\tsentence2\tscore",
            [f"{i}\t{a}\t{b}\t{score}" for i, (a, b, score) in enumerate(pairs)],
        ),
    ):
        (folder / name).mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / name / f"{split}.tsv").write_text("\n".join([header, *lines]) + "\n")
    return folder


def write_probe_tasks(folder: Path) -> Path:
    """Write all tasks of the probes, each with a few examples that are easily told apart."""
    write_task(folder)
    rows = [("the cat slept in the warm sun", 0), ("the dog ran under the tree", 1)] * 8
    named = [[text, ("sleep", "run")[label]] for text, label in rows]
    for name in ("clinc150", "banking77", "ag_news"):
        (folder / name).mkdir()
    (folder / "clinc150/data_full.json").write_text(json.dumps({"train": named, "val": named}))
    table = "\n".join(["text,category", *(",".join(row) for row in named)]) + "\n"
    lines = "\n".join(["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]) + "\n"
    for part in ("train", "test"):
        (folder / f"banking77/{part}.csv").write_text(table)
    for part in ("train_10k", "test"):
        (folder / f"ag_news/{part}.tsv").write_text(lines)
    return folder


def vocabulary(size: int = 1000, continued: int = 0) -> Vocabulary:
    """Return a vocabulary of special tokens and words; the last `continued` are continuations."""
    words = [
        f"##w{i}" if i >= size - continued else f"w{i}" for i in range(len(SPECIAL_TOKENS), size)
    ]
    return Vocabulary(
        Tokenizer(
            models.WordPiece(
                {word: i for i, word in enumerate([*SPECIAL_TOKENS, *words])}, unk_token="[UNK]"
            )
        )
    )
