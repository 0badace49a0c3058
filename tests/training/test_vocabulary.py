from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator

from training.vocabulary import SPECIAL_TOKENS, Vocabulary, learn

LEARN = """
import hashlib, pathlib
from training.corpus import Shard
from training.vocabulary import learn
tokenizer = learn(Shard(pathlib.Path("tests/data/text/book-0.txt.gz")).documents, 400)
print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
"""


def documents() -> Iterator[str]:
    yield from ["The lower the newer the slower.", "A newer, lower tower", "Ünïcode ﬁne"] * 5


def test_the_same_text_gives_the_same_words_in_every_process() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", LEARN], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    }
    assert len(said) == 1
    assert len(next(iter(said)).strip()) == len(hashlib.sha256().hexdigest())


def test_words_are_learned_uncased_and_marked_where_they_go_on() -> None:
    vocabulary = Vocabulary(learn(documents, 60))
    assert vocabulary.tokenizer.encode("THE lower").tokens == ["[CLS]", "the", "lower", "[SEP]"]
    assert (
        vocabulary.pad,
        vocabulary.unknown,
        vocabulary.cls,
        vocabulary.sep,
        vocabulary.mask,
    ) == (0, 1, 2, 3, 4)
    words = vocabulary.tokenizer.get_vocab()
    assert all(vocabulary.continues[i] == word.startswith("##") for word, i in words.items())
    assert set(vocabulary.ordinary) == set(words.values()) - set(range(5))


def test_only_the_five_special_tokens_are_special() -> None:
    tokenizer = learn(documents, 60)
    assert {token.content for token in tokenizer.get_added_tokens_decoder().values()} == set(
        SPECIAL_TOKENS
    )
    assert "##e" in tokenizer.get_vocab()
    assert "##e" not in tokenizer.encode("##e").tokens
