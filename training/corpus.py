"""
Turns text shards into a WordPiece vocabulary and memory-mapped token ids, once for all runs on the
same text.

A shard holds a paragraph a line and an empty line between documents, plain or
gzipped; a Hugging Face dataset holds a document a row. The ids are one stream,
documents ended by [SEP]; a training sequence is [CLS], a slice of the stream,
[SEP], so nothing is ever padded.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tqdm import tqdm

from command import BadInput, Unavailable
from training.config import Data
from training.vocabulary import Vocabulary, learn, read_tokenizer

DOCUMENTS_AT_ONCE = 512

Ids = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Token ids of the training and the held-out text, and the folder that holds their
    tokenizer.
    """

    directory: Path
    ids: Ids
    held_out: Ids
    vocabulary: Vocabulary
    sequence_length: int

    def __len__(self) -> int:
        return len(self.ids) // (self.sequence_length - 2)

    def batch(self, step: int, batch_size: int, seed: int) -> npt.NDArray[np.int64]:
        """The sequences of one step, (batch_size, sequence_length): a function of step and seed
        alone, so a resumed run sees what it would have seen.
        """
        places = []
        for i in range(step * batch_size, (step + 1) * batch_size):
            epoch, offset = divmod(i, len(self))
            places.append(self._order(seed, epoch)[offset])
        return self.sequences(self.ids, places)

    def sequences(self, ids: Ids, places: list[int] | range) -> npt.NDArray[np.int64]:
        room = self.sequence_length - 2
        batch = np.empty((len(places), self.sequence_length), np.int64)
        batch[:, 0], batch[:, -1] = self.vocabulary.cls, self.vocabulary.sep
        for row, place in enumerate(places):
            batch[row, 1:-1] = ids[place * room : (place + 1) * room]
        return batch

    def held_out_batches(self, batch_size: int, count: int) -> Iterator[npt.NDArray[np.int64]]:
        available = len(self.held_out) // (self.sequence_length - 2)
        for start in range(0, min(count * batch_size, available), batch_size):
            yield self.sequences(self.held_out, range(start, min(start + batch_size, available)))

    def _order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        cached: dict[tuple[int, int], npt.NDArray[np.int64]] = self.__dict__.setdefault(
            "_orders", {}
        )
        if (seed, epoch) not in cached:
            cached.clear()
            cached[seed, epoch] = np.random.default_rng([seed, epoch]).permutation(len(self))
        return cached[seed, epoch]


def prepare(data: Data, folder: Path, beside: Path) -> Corpus:
    """The corpus of this text, read from `beside/corpus-<digest>` or built there first.

    Raises Unavailable if a shard pattern matches nothing below `folder`, BadInput if a shard is
    empty or broken, or a given tokenizer does not fit.
    """
    held_out = [Shard(path) for path in _find(folder, data.held_out)]
    text: list[Source] = (
        [Dataset(data)] if data.dataset else [Shard(path) for path in _find(folder, data.text)]
    )
    both = {source.name for source in text} & {shard.name for shard in held_out}
    if both:
        raise BadInput(
            f"{sorted(both)[0]} is among the text and the held-out text; what is trained on cannot"
            " be held out."
        )
    given = _find(folder, [data.tokenizer])[0] if data.tokenizer else None
    sources = {source.name: source.digest() for source in [*text, *held_out]}
    directory = (
        beside / f"corpus-{_fingerprint(sources, len(text), given, data.vocabulary_size)[:12]}"
    )
    if not directory.exists():
        _build(directory, text, held_out, sources, given, data.vocabulary_size)
    corpus = Corpus(
        directory=directory,
        ids=np.memmap(directory / "ids.bin", np.uint16, "r"),
        held_out=np.memmap(directory / "held_out.bin", np.uint16, "r"),
        vocabulary=Vocabulary(Tokenizer.from_file(str(directory / "tokenizer.json"))),
        sequence_length=data.sequence_length,
    )
    for what, ids in (("text", corpus.ids), ("held_out", corpus.held_out)):
        if len(ids) < data.sequence_length:
            raise Unavailable(
                f"{folder}: {what} holds less than one sequence of {data.sequence_length} tokens."
            )
    return corpus


class Source(Protocol):
    """Something that holds documents, and has a name and a digest to be remembered by."""

    @property
    def name(self) -> str: ...

    def digest(self) -> str: ...

    def documents(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class Shard:
    """A file of paragraphs, with an empty line between documents."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def digest(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def documents(self) -> Iterator[str]:
        opener = gzip.open if self.path.suffix == ".gz" else open
        paragraphs: list[str] = []
        try:
            with opener(self.path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    if line.strip():
                        paragraphs.append(line.strip())
                    elif paragraphs:
                        yield "\n".join(paragraphs)
                        paragraphs = []
        except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise BadInput(f"{self.path} is no UTF-8 text, plain or gzipped ({error}).") from None
        if paragraphs:
            yield "\n".join(paragraphs)


class Dataset:
    """A column of a dataset of the Hugging Face hub, or of a folder in that form; a document
    a row.
    """

    def __init__(self, data: Data) -> None:
        try:
            import datasets
        except ModuleNotFoundError:
            raise Unavailable(
                "The package datasets is not installed; pip install 'drbert-serve[training]'."
            ) from None
        self._data = data
        try:
            self._rows = datasets.load_dataset(
                data.dataset, data.dataset_config or None, split=data.dataset_split
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise Unavailable(
                f"The dataset {data.dataset!r} cannot be had: {str(error).splitlines()[0]}"
            ) from None
        if data.text_column not in self._rows.column_names:
            raise BadInput(
                f"The dataset {data.dataset!r} has no column {data.text_column!r}; it has"
                f" {', '.join(self._rows.column_names)}."
            )

    @property
    def name(self) -> str:
        return ":".join(
            filter(None, (self._data.dataset, self._data.dataset_config, self._data.dataset_split))
        )

    def digest(self) -> str:
        return f"{self._rows._fingerprint}:{self._data.text_column}"

    def documents(self) -> Iterator[str]:
        return (text for row in self._rows if (text := row[self._data.text_column].strip()))


def _find(folder: Path, patterns: list[str]) -> list[Path]:
    if not folder.is_dir():
        raise Unavailable(
            f"The data folder {folder} does not exist; --data names the folder that holds"
            f" {patterns[0]}."
        )
    found = []
    for pattern in patterns:
        matches = sorted(folder.glob(pattern))
        if not matches:
            raise Unavailable(
                f"{folder} holds no {pattern}; --data names the folder that the config's text is"
                " below."
            )
        found += matches
    return found


def _fingerprint(
    sources: dict[str, str], trained_on: int, given: Path | None, vocabulary_size: int
) -> str:
    """Of everything the ids follow from."""
    told = json.dumps([list(sources.items()), trained_on, vocabulary_size]).encode()
    return hashlib.sha256(told + (given.read_bytes() if given else b"")).hexdigest()


def _build(
    directory: Path,
    text: Sequence[Source],
    held_out: Sequence[Source],
    sources: dict[str, str],
    given: Path | None,
    vocabulary_size: int,
) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".corpus-", dir=directory.parent))
    try:
        tokenizer = (
            read_tokenizer(given, vocabulary_size)
            if given
            else learn(lambda: _documents(text), vocabulary_size)
        )
        tokenizer.save(str(building / "tokenizer.json"))
        for name, of in (("ids.bin", text), ("held_out.bin", held_out)):
            with (building / name).open("wb") as file:
                for source in tqdm(of, desc=f"tokenising {name}", unit="source"):
                    _write_ids(Vocabulary(tokenizer), source, file)
        (building / "sources.json").write_text(json.dumps(sources, indent=2), encoding="utf-8")
        # One rename: a corpus is there whole or not at all, also when two runs build it at once.
        try:
            building.rename(directory)
        except OSError:
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _documents(sources: Sequence[Source]) -> Iterator[str]:
    return (document for source in sources for document in source.documents())


def _write_ids(vocabulary: Vocabulary, source: Source, file: BinaryIO) -> None:
    empty, documents = True, source.documents()
    while some := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        empty = False
        for encoding in vocabulary.tokenizer.encode_batch(some, add_special_tokens=False):
            np.array([*encoding.ids, vocabulary.sep], np.uint16).tofile(file)
    if empty:
        raise BadInput(f"{source.name} holds no text; remove it or fill it.")
