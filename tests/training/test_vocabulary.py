"""The same text gives the same tokenizer in every process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator

from training.vocabulary import SPECIAL_TOKENS, Vocabulary, train_tokenizer

LEARN = """
import hashlib, pathlib
from training.corpus import Shard
from training.vocabulary import train_tokenizer
tokenizer = train_tokenizer(Shard(pathlib.Path("tests/data/text/book-0.txt.gz")).documents, 400)
print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
"""


def documents() -> Iterator[str]:
    yield from ["The lower the newer the slower.", "A newer, lower tower", "Ünïcode ﬁne"] * 5


def test_the_same_text_gives_the_same_words_in_every_process() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", LEARN], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    }
    assert len(digests) == 1
    assert len(next(iter(digests)).strip()) == len(hashlib.sha256().hexdigest())


def test_words_are_learned_uncased_and_continuations_are_marked() -> None:
    vocabulary = Vocabulary(train_tokenizer(documents, 60))
    assert vocabulary.tokenizer.encode("THE lower").tokens == ["[CLS]", "the", "lower", "[SEP]"]
    assert (
        vocabulary.pad,
        vocabulary.unknown,
        vocabulary.cls,
        vocabulary.sep,
        vocabulary.mask,
    ) == (0, 1, 2, 3, 4)
    words = vocabulary.tokenizer.get_vocab()
    assert all(vocabulary.is_continuation[i] == word.startswith("##") for word, i in words.items())
    assert set(vocabulary.ordinary) == set(words.values()) - set(range(5))


def test_only_the_five_special_tokens_are_special() -> None:
    tokenizer = train_tokenizer(documents, 60)
    assert {token.content for token in tokenizer.get_added_tokens_decoder().values()} == set(
        SPECIAL_TOKENS
    )
    assert "##e" in tokenizer.get_vocab()
    assert "##e" not in tokenizer.encode("##e").tokens
