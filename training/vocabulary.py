"""
The words that a model knows: a WordPiece tokenizer, learned from text or given, and what masking
asks of it.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from command import BadInput

MOST_CHARACTERS = 400
"""Of the text's own; rarer ones are unknown."""
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Vocabulary:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad, self.unknown, self.cls, self.sep, self.mask = (
            tokenizer.token_to_id(token) for token in SPECIAL_TOKENS
        )

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    @functools.cached_property
    def ordinary(self) -> npt.NDArray[np.int64]:
        """The ids of all words that are not special."""
        return np.setdiff1d(
            np.arange(len(self)), (self.pad, self.unknown, self.cls, self.sep, self.mask)
        )

    @functools.cached_property
    def continues(self) -> npt.NDArray[np.bool_]:
        """(V) True for ids that go on with the word before them."""
        found = np.zeros(len(self), bool)
        found[[i for token, i in self.tokenizer.get_vocab().items() if token.startswith("##")]] = (
            True
        )
        return found


def learn(documents: Callable[[], Iterable[str]], size: int) -> Tokenizer:
    """An uncased WordPiece tokenizer with BERT's special tokens and template, of `size` words at
    most.

    The same text gives the same words. The trainer of tokenizers alone does not see to that: it
    numbers characters in the order of a hash table, and ties between merges are broken by number.
    So the characters, and those within words, are counted and numbered here.
    """
    tokenizer = _uncased(Tokenizer(models.WordPiece(unk_token="[UNK]")))
    counts = Counter(
        word
        for document in documents()
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
            tokenizer.normalizer.normalize_str(document)
        )
    )
    characters: Counter[str] = Counter()
    for word, count in counts.items():
        characters.update(dict.fromkeys(word, count))
    alphabet = set(
        sorted(characters, key=lambda character: (-characters[character], character))[
            :MOST_CHARACTERS
        ]
    )
    known = {word: count for word, count in sorted(counts.items()) if alphabet.issuperset(word)}
    within = sorted({f"##{character}" for word in known for character in word[1:]})
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=[*SPECIAL_TOKENS, *within], show_progress=False
    )
    tokenizer.train_from_iterator(
        (" ".join([word] * count) for word, count in known.items()), trainer
    )
    # Without what the trainer took for special.
    learned = _uncased(Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]")))
    learned.add_special_tokens(list(SPECIAL_TOKENS))
    return _with_template(learned)


def _uncased(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def read_tokenizer(path: Path, size: int) -> Tokenizer:
    """A tokenizer made elsewhere; BadInput unless it is WordPiece with BERT's special tokens and
    `size` words.
    """
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower.
        raise BadInput(
            f"{path} is no tokenizer.json of a WordPiece tokenizer ({type(error).__name__}:"
            f" {error})."
        ) from None
    missing = [token for token in SPECIAL_TOKENS if token not in words]
    if missing:
        raise BadInput(
            f"{path} has no {missing[0]}; a tokenizer must know {', '.join(SPECIAL_TOKENS)}."
        )
    if tokenizer.get_vocab_size() != size:
        raise BadInput(
            f"{path} has {tokenizer.get_vocab_size()} words and the config says vocabulary_size ="
            f" {size}; make them equal."
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _with_template(tokenizer)


def _with_template(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer
