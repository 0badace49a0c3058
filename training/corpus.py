"""
Turns text shards into a WordPiece vocabulary and memory-mapped token ids, once for all runs on the same text.

A shard holds a paragraph a line and an empty line between documents, plain or
gzipped. The ids are one stream, documents ended by [SEP]; a training sequence is
[CLS], a slice of the stream, [SEP], so nothing is ever padded.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from command import BadInput, Unavailable
from training.config import Data

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

Ids = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Token ids of the training and the held-out text, and the folder that holds their tokenizer."""

    directory: Path
    ids: Ids
    held_out: Ids
    vocabulary_size: int
    sequence_length: int

    def __len__(self) -> int:
        return len(self.ids) // (self.sequence_length - 2)

    def batch(self, step: int, batch_size: int, seed: int) -> npt.NDArray[np.int64]:
        """The sequences of one step, (batch_size, sequence_length): a function of step and seed alone, so a resumed run sees what it would have seen."""
        places = []
        for i in range(step * batch_size, (step + 1) * batch_size):
            epoch, offset = divmod(i, len(self))
            places.append(self._order(seed, epoch)[offset])
        return self.sequences(self.ids, places)

    def sequences(self, ids: Ids, places: list[int] | range) -> npt.NDArray[np.int64]:
        room = self.sequence_length - 2
        batch = np.empty((len(places), self.sequence_length), np.int64)
        batch[:, 0], batch[:, -1] = CLS, SEP
        for row, place in enumerate(places):
            batch[row, 1:-1] = ids[place * room : (place + 1) * room]
        return batch

    def held_out_batches(self, batch_size: int, count: int) -> Iterator[npt.NDArray[np.int64]]:
        available = len(self.held_out) // (self.sequence_length - 2)
        for start in range(0, min(count * batch_size, available), batch_size):
            yield self.sequences(self.held_out, range(start, min(start + batch_size, available)))

    def _order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        cached: dict[tuple[int, int], npt.NDArray[np.int64]] = self.__dict__.setdefault("_orders", {})
        if (seed, epoch) not in cached:
            cached.clear()
            cached[seed, epoch] = np.random.default_rng([seed, epoch]).permutation(len(self))
        return cached[seed, epoch]


def prepare(data: Data, folder: Path, beside: Path) -> Corpus:
    """The corpus of these shards, read from `beside/corpus-<digest>` or built there first.

    Raises Unavailable if a shard pattern matches nothing below `folder`.
    """
    text, held_out = _find(folder, data.text), _find(folder, data.held_out)
    directory = beside / f"corpus-{_fingerprint(text, held_out, data.vocabulary_size)[:12]}"
    both = {shard.name for shard in text} & {shard.name for shard in held_out}
    if both:
        raise BadInput(f"{sorted(both)[0]} is among the text and the held-out text; what is trained on cannot be held out.")
    if not directory.exists():
        _build(directory, text, held_out, data.vocabulary_size)
    corpus = Corpus(
        directory=directory,
        ids=np.memmap(directory / "ids.bin", np.uint16, "r"),
        held_out=np.memmap(directory / "held_out.bin", np.uint16, "r"),
        vocabulary_size=Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size(),
        sequence_length=data.sequence_length,
    )
    for what, ids in (("text", corpus.ids), ("held_out", corpus.held_out)):
        if len(ids) < data.sequence_length:
            raise Unavailable(f"{folder}: {what} holds less than one sequence of {data.sequence_length} tokens.")
    return corpus


def read_documents(shard: Path) -> Iterator[str]:
    opener = gzip.open if shard.suffix == ".gz" else open
    with opener(shard, "rt", encoding="utf-8") as lines:
        paragraphs: list[str] = []
        for line in lines:
            if line.strip():
                paragraphs.append(line.strip())
            elif paragraphs:
                yield "\n".join(paragraphs)
                paragraphs = []
        if paragraphs:
            yield "\n".join(paragraphs)


def _find(folder: Path, patterns: list[str]) -> list[Path]:
    if not folder.is_dir():
        raise Unavailable(f"The data folder {folder} does not exist; --data names the folder that holds {patterns[0]}.")
    found = []
    for pattern in patterns:
        matches = sorted(folder.glob(pattern))
        if not matches:
            raise Unavailable(f"{folder} holds no {pattern}; --data names the folder that the config's text is below.")
        found += matches
    return found


def _fingerprint(text: list[Path], held_out: list[Path], vocabulary_size: int) -> str:
    digest = hashlib.sha256(f"{vocabulary_size}".encode())
    for use, shards in (("text", text), ("held_out", held_out)):
        for shard in shards:
            digest.update(f"{use} {shard.name} ".encode() + hashlib.sha256(shard.read_bytes()).digest())
    return digest.hexdigest()


def _build(directory: Path, text: list[Path], held_out: list[Path], vocabulary_size: int) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".corpus-", dir=directory.parent))
    try:
        tokenizer = train_tokenizer(text, vocabulary_size)
        tokenizer.save(str(building / "tokenizer.json"))
        for name, shards in (("ids.bin", text), ("held_out.bin", held_out)):
            with (building / name).open("wb") as file:
                for shard in tqdm(shards, desc=f"tokenising {name}", unit="shard"):
                    for encoding in tokenizer.encode_batch(list(read_documents(shard)), add_special_tokens=False):
                        np.array([*encoding.ids, SEP], np.uint16).tofile(file)
        sources = {s.name: hashlib.sha256(s.read_bytes()).hexdigest() for s in text + held_out}
        (building / "sources.json").write_text(json.dumps(sources, indent=2))
        # One rename: a corpus is there whole or not at all, also when two runs build it at once.
        try:
            building.rename(directory)
        except OSError:
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def train_tokenizer(shards: list[Path], vocabulary_size: int) -> Tokenizer:
    """An uncased WordPiece tokenizer with BERT's special tokens and template."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size, special_tokens=SPECIAL_TOKENS, limit_alphabet=400, show_progress=False
    )
    documents = (document for shard in shards for document in read_documents(shard))
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return tokenizer
