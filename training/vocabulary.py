"""
Trains or reads a model's WordPiece tokenizer, and holds what masking needs to know of it.
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

MAX_ALPHABET = 400
"""Number of different characters that the vocabulary covers; words with rarer ones are [UNK]."""
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Vocabulary:
    """A tokenizer and the ids of its special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad, self.unknown, self.cls, self.sep, self.mask = (
            tokenizer.token_to_id(token) for token in SPECIAL_TOKENS
        )

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    @functools.cached_property
    def ordinary(self) -> npt.NDArray[np.int64]:
        """The ids of all tokens that are not special, ascending."""
        return np.setdiff1d(
            np.arange(len(self)), (self.pad, self.unknown, self.cls, self.sep, self.mask)
        )

    @functools.cached_property
    def is_continuation(self) -> npt.NDArray[np.bool_]:
        """A mask (V), True for ids that continue the word before them."""
        tokens = self.tokenizer.get_vocab().items()
        mask = np.zeros(len(self), bool)
        mask[[i for token, i in tokens if token.startswith("##")]] = True
        return mask


def train_tokenizer(documents: Callable[[], Iterable[str]], size: int) -> Tokenizer:
    """Train an uncased WordPiece tokenizer with BERT's special tokens and template.

    It has `size` words at most. The same text gives the same words, which the trainer of
    `tokenizers` alone does not guarantee: it numbers characters in the order of a hash table, and
    breaks ties between merges by number. So characters are counted and numbered here.
    """
    tokenizer = _uncased(Tokenizer(models.WordPiece(unk_token="[UNK]")))
    counts: Counter[str] = Counter()
    for document in documents():
        normalized = tokenizer.normalizer.normalize_str(document)
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized))
    characters: Counter[str] = Counter()
    for word, count in counts.items():
        characters.update(dict.fromkeys(word, count))
    by_frequency = sorted(characters, key=lambda character: (-characters[character], character))
    alphabet = set(by_frequency[:MAX_ALPHABET])
    known = {word: count for word, count in sorted(counts.items()) if alphabet.issuperset(word)}
    within = sorted({f"##{character}" for word in known for character in word[1:]})
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=[*SPECIAL_TOKENS, *within], show_progress=False
    )
    tokenizer.train_from_iterator(
        (" ".join([word] * count) for word, count in known.items()), trainer
    )
    # The trainer made the characters within words special; only BERT's five tokens are.
    learned = _uncased(Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]")))
    learned.add_special_tokens(list(SPECIAL_TOKENS))
    return _with_template(learned)


def _uncased(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def read_tokenizer(path: Path, size: int) -> Tokenizer:
    """Read a tokenizer.json that was made elsewhere.

    Raises BadInput unless it is WordPiece with BERT's special tokens and `size` words.
    """
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower.
        raise BadInput(
            f"{path} is not the tokenizer.json of a WordPiece tokenizer ({type(error).__name__}:"
            f" {error})."
        ) from None
    missing = [token for token in SPECIAL_TOKENS if token not in words]
    if missing:
        raise BadInput(
            f"{path} has no {missing[0]}; a tokenizer must have {', '.join(SPECIAL_TOKENS)}."
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
