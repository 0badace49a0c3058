"""A corpus is tokenised once, and its sequences are slices of the text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from command import BadInput, Unavailable
from tests.training.factories import TEXT, tiny, write_text
from training import corpus as corpora
from training.config import Data
from training.corpus import prepare
from training.vocabulary import SPECIAL_TOKENS


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return tiny("none", tmp_path / "c.toml").data


def test_sequences_are_whole_slices_of_the_text_between_cls_and_sep(
    tmp_path: Path, data: Data
) -> None:
    corpus = prepare(data, TEXT, tmp_path)
    batch = corpus.batch(0, 8, 0)
    assert batch.shape == (8, 32)
    assert (batch[:, 0] == corpus.vocabulary.cls).all()
    assert (batch[:, -1] == corpus.vocabulary.sep).all()
    assert not (batch == corpus.vocabulary.pad).any()
    first = np.asarray(corpus.ids[:30], np.int64)
    assert any(
        (row[1:-1] == first).all()
        for step in range(len(corpus) // 8)
        for row in corpus.batch(step, 8, 0)
    )


def test_text_is_tokenised_once(tmp_path: Path, data: Data) -> None:
    written_at = (prepare(data, TEXT, tmp_path).directory / "ids.bin").stat().st_mtime_ns
    assert (prepare(data, TEXT, tmp_path).directory / "ids.bin").stat().st_mtime_ns == written_at


def test_of_two_runs_that_write_the_same_corpus_at_once_the_second_keeps_the_first_ones(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = corpora._write

    def write_after_the_other(directory: Path, *arguments: Any) -> None:
        monkeypatch.setattr(corpora, "_write", write)
        identity.append((prepare(data, TEXT, tmp_path).directory / "ids.bin").stat().st_ino)
        write(directory, *arguments)

    identity: list[int] = []
    monkeypatch.setattr(corpora, "_write", write_after_the_other)
    corpus = prepare(data, TEXT, tmp_path)
    assert [(corpus.directory / "ids.bin").stat().st_ino] == identity
    assert [path.name for path in tmp_path.glob("*corpus-*")] == [corpus.directory.name]


def test_text_that_is_trained_on_cannot_be_held_out(tmp_path: Path, data: Data) -> None:
    swapped = data.model_copy(update={"text": ["book-1.txt.gz"], "held_out": ["book-0.txt.gz"]})
    assert prepare(data, TEXT, tmp_path).directory != prepare(swapped, TEXT, tmp_path).directory
    with pytest.raises(BadInput, match="is both training and held-out text"):
        prepare(data.model_copy(update={"text": ["*.txt.gz"]}), TEXT, tmp_path)


def test_a_missing_shard_an_empty_one_and_a_broken_one_are_named(
    tmp_path: Path, data: Data
) -> None:
    text = write_text(tmp_path / "text")
    with pytest.raises(Unavailable, match=r"holds no missing-\*\.txt"):
        prepare(data.model_copy(update={"text": ["missing-*.txt"]}), text, tmp_path)
    with gzip.open(text / "book-0.txt.gz", "wt") as file:
        file.write("\n\n")
    with pytest.raises(BadInput, match=r"book-0\.txt\.gz holds no text"):
        prepare(data, text, tmp_path)
    (text / "book-0.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(BadInput, match=r"book-0\.txt\.gz is not UTF-8 text"):
        prepare(data, text, tmp_path)
    assert not list(tmp_path.glob("corpus-*"))
    assert not list(tmp_path.glob(".corpus-*"))


def write_tokenizer(path: Path, tokens: tuple[str, ...]) -> Path:
    words = dict.fromkeys(
        [
            "the",
            "of",
            "##s",
            *"abcdefghijklmnopqrstuvwxyz",
            *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
        ]
    )
    vocabulary = {word: i for i, word in enumerate([*words, *tokens])}
    Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")).save(str(path))
    return path


def test_a_tokenizer_from_elsewhere_keeps_its_ids(tmp_path: Path, data: Data) -> None:
    text = write_text(tmp_path / "text")
    write_tokenizer(text / "tokenizer.json", SPECIAL_TOKENS)
    changed = data.model_copy(update={"tokenizer": "tokenizer.json", "vocabulary_size": 59})
    corpus = prepare(changed, text, tmp_path)
    assert corpus.vocabulary.pad == 54
    assert (corpus.batch(0, 2, 0)[:, 0] == 56).all()
    assert corpus.vocabulary.is_continuation.sum() == 26
    assert set(corpus.vocabulary.ordinary) == set(range(54))
    with pytest.raises(BadInput, match="has 59 words and the config says vocabulary_size = 512"):
        prepare(changed.model_copy(update={"vocabulary_size": 512}), text, tmp_path)
    write_tokenizer(text / "tokenizer.json", SPECIAL_TOKENS[:-1])
    with pytest.raises(BadInput, match=r"has no \[MASK\]"):
        prepare(changed, text, tmp_path)
    (text / "tokenizer.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(BadInput, match=r"is not the tokenizer\.json"):
        prepare(changed, text, tmp_path)


def test_text_may_come_from_a_dataset(tmp_path: Path, data: Data) -> None:
    (tmp_path / "set").mkdir()
    rows = [
        json.dumps(
            {"body": f"document {i} tells of a cat and of a dog that ran in the sun all day"}
        )
        for i in range(60)
    ]
    (tmp_path / "set/train.jsonl").write_text("\n".join(rows))
    changed = data.model_copy(
        update={"text": [], "dataset": str(tmp_path / "set"), "text_column": "body"}
    )
    corpus = prepare(changed, TEXT, tmp_path)
    assert (np.asarray(corpus.ids) == corpus.vocabulary.sep).sum() == 60
    with pytest.raises(BadInput, match="has no column 'text'; it has body"):
        prepare(changed.model_copy(update={"text_column": "text"}), TEXT, tmp_path)
    with pytest.raises(Unavailable, match="cannot be loaded"):
        prepare(changed.model_copy(update={"dataset": str(tmp_path / "nowhere")}), TEXT, tmp_path)
