"""
Tokenises text once for all runs on it: a WordPiece vocabulary and memory-mapped token ids.

A shard is a text file, plain or gzipped, with a paragraph a line and an empty line between
documents. A Hugging Face dataset has a document a row. The ids are one stream in which [SEP] ends
every document. A training sequence is [CLS], a slice of the stream and [SEP], so nothing is padded.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tqdm import tqdm

from atomic import atomic_directory
from command import BadInput, Unavailable, how_to_install
from training.config import Data
from training.vocabulary import Vocabulary, read_tokenizer, train_tokenizer

DOCUMENTS_AT_ONCE = 512
"""Number of documents that are tokenised together."""

Ids = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Token ids of the training text and the held-out text, and the folder that they are in."""

    directory: Path
    ids: Ids
    held_out: Ids
    vocabulary: Vocabulary
    sequence_length: int

    def __len__(self) -> int:
        return len(self.ids) // (self.sequence_length - 2)

    def batch(self, step: int, batch_size: int, seed: int) -> npt.NDArray[np.int64]:
        """Return the sequences of one step, (batch_size, sequence_length).

        They are a function of step and seed alone, so a resumed run sees the same ones.
        """
        numbers = []
        for i in range(step * batch_size, (step + 1) * batch_size):
            epoch, offset = divmod(i, len(self))
            numbers.append(self._order(seed, epoch)[offset])
        return self.sequences(self.ids, numbers)

    def sequences(self, ids: Ids, numbers: list[int] | range) -> npt.NDArray[np.int64]:
        """Return the sequences of `ids` with the given numbers, (N, sequence_length)."""
        content = self.sequence_length - 2
        batch = np.empty((len(numbers), self.sequence_length), np.int64)
        batch[:, 0], batch[:, -1] = self.vocabulary.cls, self.vocabulary.sep
        for row, number in enumerate(numbers):
            batch[row, 1:-1] = ids[number * content : (number + 1) * content]
        return batch

    def held_out_batches(self, batch_size: int, count: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield at most `count` batches of held-out sequences, (batch_size, sequence_length)."""
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


def prepare(data: Data, folder: Path, corpora: Path) -> Corpus:
    """Return the corpus of a text, from `corpora`/corpus-DIGEST, which is written if it is missing.

    The text is below `folder`. Raises Unavailable if a shard pattern matches nothing, BadInput if a
    shard is empty or broken or a tokenizer does not fit.
    """
    held_out = [Shard(path) for path in _find(folder, data.held_out)]
    text: list[Source] = []
    if data.dataset:
        text.append(Dataset(data))
    else:
        text += [Shard(path) for path in _find(folder, data.text)]
    both = {source.name for source in text} & {shard.name for shard in held_out}
    if both:
        raise BadInput(
            f"{sorted(both)[0]} is both training and held-out text; remove it from one of them."
        )
    tokenizer = _find(folder, [data.tokenizer])[0] if data.tokenizer else None
    sources = {source.name: source.digest() for source in [*text, *held_out]}
    digest = _fingerprint(sources, len(text), tokenizer, data.vocabulary_size)
    directory = corpora / f"corpus-{digest[:12]}"
    if not directory.exists():
        # Two runs may write the same corpus at once; the second keeps the first one's.
        with atomic_directory(directory, keep_existing=True) as draft:
            _write(draft, text, held_out, tokenizer, data.vocabulary_size)
            (draft / "sources.json").write_text(json.dumps(sources, indent=2), encoding="utf-8")
    corpus = Corpus(
        directory=directory,
        ids=np.memmap(directory / "ids.bin", np.uint16, "r"),
        held_out=np.memmap(directory / "held_out.bin", np.uint16, "r"),
        vocabulary=Vocabulary(Tokenizer.from_file(str(directory / "tokenizer.json"))),
        sequence_length=data.sequence_length,
    )
    for name, ids in (("text", corpus.ids), ("held_out", corpus.held_out)):
        if len(ids) < data.sequence_length:
            raise Unavailable(
                f"{folder}: {name} has {len(ids)} tokens, less than one sequence of"
                f" {data.sequence_length}."
            )
    return corpus


class Source(Protocol):
    """A source of documents, identified by its name and its digest."""

    @property
    def name(self) -> str:
        """The name under which the corpus lists the source."""
        ...

    def digest(self) -> str:
        """Return a digest of the content."""
        ...

    def documents(self) -> Iterator[str]:
        """Yield the documents in order."""
        ...


@dataclass(frozen=True)
class Shard:
    """A text file, plain or gzipped, with an empty line between documents."""

    path: Path

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    def digest(self) -> str:
        """Return the file's SHA-256."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield the documents, a paragraph a line; BadInput if the file is not UTF-8 text."""
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
            raise BadInput(f"{self.path} is not UTF-8 text, plain or gzipped ({error}).") from None
        if paragraphs:
            yield "\n".join(paragraphs)


class Dataset:
    """A text column of a Hugging Face dataset, with a document a row.

    The dataset is on the hub or in a folder that `datasets` can load.
    """

    def __init__(self, data: Data) -> None:
        try:
            import datasets
        except ModuleNotFoundError:
            raise Unavailable(
                f"The package datasets is not installed; {how_to_install('training')}."
            ) from None
        self._data = data
        try:
            self._rows = datasets.load_dataset(
                data.dataset, data.dataset_config or None, split=data.dataset_split
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise Unavailable(
                f"The dataset {data.dataset!r} cannot be loaded: {str(error).splitlines()[0]}"
            ) from None
        if data.text_column not in self._rows.column_names:
            raise BadInput(
                f"The dataset {data.dataset!r} has no column {data.text_column!r}; it has"
                f" {', '.join(self._rows.column_names)}."
            )

    @property
    def name(self) -> str:
        """Dataset, configuration and split, separated by colons."""
        parts = (self._data.dataset, self._data.dataset_config, self._data.dataset_split)
        return ":".join(filter(None, parts))

    def digest(self) -> str:
        """Return the fingerprint that `datasets` gives the rows, and the column."""
        return f"{self._rows._fingerprint}:{self._data.text_column}"

    def documents(self) -> Iterator[str]:
        """Yield the texts that are not empty."""
        for row in self._rows:
            text = row[self._data.text_column].strip()
            if text:
                yield text


def _find(folder: Path, patterns: list[str]) -> list[Path]:
    if not folder.is_dir():
        raise Unavailable(
            f"The data folder {folder} does not exist; --data names the folder that holds"
            f" {patterns[0]}."
        )
    paths: list[Path] = []
    for pattern in patterns:
        matches = sorted(folder.glob(pattern))
        if not matches:
            raise Unavailable(
                f"{folder} holds no {pattern}; --data names the folder that holds the config's"
                " text."
            )
        paths += matches
    return paths


def _fingerprint(
    sources: dict[str, str], training_sources: int, tokenizer: Path | None, vocabulary_size: int
) -> str:
    """Return a digest of everything that the ids depend on."""
    described = json.dumps([list(sources.items()), training_sources, vocabulary_size]).encode()
    if tokenizer is not None:
        described += tokenizer.read_bytes()
    return hashlib.sha256(described).hexdigest()


def _write(
    directory: Path,
    text: Sequence[Source],
    held_out: Sequence[Source],
    tokenizer_path: Path | None,
    vocabulary_size: int,
) -> None:
    """Write the tokenizer and the ids of a corpus."""
    if tokenizer_path is None:
        tokenizer = train_tokenizer(lambda: _documents(text), vocabulary_size)
    else:
        tokenizer = read_tokenizer(tokenizer_path, vocabulary_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    vocabulary = Vocabulary(tokenizer)
    for name, sources in (("ids.bin", text), ("held_out.bin", held_out)):
        with (directory / name).open("wb") as file:
            for source in tqdm(sources, desc=f"tokenising {name}", unit="source"):
                _write_ids(vocabulary, source, file)


def _documents(sources: Sequence[Source]) -> Iterator[str]:
    return (document for source in sources for document in source.documents())


def _write_ids(vocabulary: Vocabulary, source: Source, file: BinaryIO) -> None:
    empty, documents = True, source.documents()
    while chunk := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        empty = False
        for encoding in vocabulary.tokenizer.encode_batch(chunk, add_special_tokens=False):
            np.array([*encoding.ids, vocabulary.sep], np.uint16).tofile(file)
    if empty:
        raise BadInput(f"{source.name} holds no text; remove it or fill it.")
