"""A tokenizer's tokens: their ids by name, and the text of several."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

UNKNOWN = ("[UNK]", "<unk>")
"""Names of the token that stands for an unknown word."""


class Vocabulary:
    """A tokenizer's tokens, for the entities of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        named = getattr(tokenizer.model, "unk_token", None)
        names = UNKNOWN if named is None else (named, *UNKNOWN)
        self.unknown: int | None = first_id(tokenizer, names)
        self.marks_continuations = bool(getattr(tokenizer.model, "continuing_subword_prefix", None))

    def token(self, token_id: int) -> str:
        """Return a token as the vocabulary holds it."""
        return str(self._tokenizer.id_to_token(token_id))

    def join(self, tokens: Sequence[str]) -> str:
        """Return the text of several tokens."""
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))


def first_id(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    """Return the id of the first of these tokens that there is."""
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((token_id for token_id in ids if token_id is not None), None)
