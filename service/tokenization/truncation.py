"""
Truncation of texts to a model's length, with the same results as a tokenizer's own truncation.

A tokenizer holds its truncation as state. One for every kind of truncation would be three
vocabularies in memory, and three loads during which nothing else runs. So the tokens are cut here.

A text that is far longer than the model reads is cut before it is tokenized. The cut is where the
tokens on one side of it are the same as in the whole text.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

from service.errors import InvalidInput

Side = Literal["right", "left"]

# Tokens so near to a cut are not used. The cut may have divided an added token, a grapheme or a
# word.
MARGIN_CHARS = 256
# The first attempt reads so many characters for each token that is needed, each further one GROWTH
# times as many.
CHARS_PER_TOKEN = 8
GROWTH = 4

# Components that look only at a character and its neighbours. Others, and those of newer releases
# of tokenizers, may look at the whole text.
NORMALIZERS = {
    "BertNormalizer",
    "Lowercase",
    "StripAccents",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Precompiled",
    "Strip",
    "Prepend",
    "Replace",
}
PRE_TOKENIZERS = {
    "BertPreTokenizer",
    "Whitespace",
    "WhitespaceSplit",
    "ByteLevel",
    "Metaspace",
    "Punctuation",
    "Digits",
}
REPLACED = {" {2,}", r"\s+", r"\s{2,}", r"\n", r"\n+", r"\t"}
WHITESPACE = " \t\n\r"
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff"
# The longest added token for which MARGIN_CHARS has room.
MAX_ADDED_CHARS = MARGIN_CHARS // 2


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each half of a pair remain in `room` tokens.

    The longer half is cut to the length of the other one before both are cut, as transformers'
    `longest_first` does.
    """
    if first + second <= room:
        return first, second
    shorter, longer = sorted((first, second))
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter = room // 2
        longer = shorter + room % 2
    return (longer, shorter) if first > second else (shorter, longer)


def truncate_pair(
    encoding: Encoding,
    room: int,
    side: Side,
    keeps_second: bool = False,
    second_tokens: int | None = None,
) -> list[int]:
    """Return the indices of the tokens that remain if both halves may have `room` tokens together.

    Special tokens remain, and do not count. With `keeps_second` only the first half is cut, as
    transformers' `only_first` does; raises InvalidInput if the second leaves no room for it. Before
    that, the second half is cut to `second_tokens`, on the right.
    """
    halves: tuple[list[int], list[int]] = ([], [])
    special: list[int] = []
    for index, half in enumerate(encoding.sequence_ids):
        (special if half is None else halves[half]).append(index)
    del halves[1][second_tokens if second_tokens is not None else len(halves[1]) :]
    remaining = special
    if keeps_second:
        counts = room - len(halves[1]), len(halves[1])
        if counts[0] < 1:
            raise InvalidInput(
                f"hypothesis_template makes a sentence of {counts[1]} tokens, and a text and its"
                f" sentence may have {room} together; shorten it, or the labels.",
                param="hypothesis_template",
            )
    else:
        counts = longest_first(len(halves[0]), len(halves[1]), room)
    for indices, count in zip(halves, counts, strict=True):
        remaining += indices[:count] if side == "right" else indices[len(indices) - count :]
    return sorted(remaining)


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Where a text may be cut, so that the tokens on both sides are tokens of the whole text."""

    pattern: re.Pattern[str]
    """Matches the first character after a cut. No word and no added token spans it."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Boundaries | None:
        """Return a tokenizer's boundaries; None if it is not known to have any."""
        normalizers, pre_tokenizers = _parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)
        types = {part["type"] for part in pre_tokenizers}
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        if not (
            all(map(_is_local, normalizers))
            and types <= PRE_TOKENIZERS
            and _is_by_word(tokenizer.model)
        ):
            return None
        if any(len(text) > MAX_ADDED_CHARS or re.search(r"\s", text) for text in added):
            return None
        spaces = "".join(space for space in WHITESPACE if _splits(tokenizer, space))
        # The first of a run of white space, because a run may be one token.
        patterns = [rf"(?<=\S)[{spaces}]"] if spaces else []
        if "BertPreTokenizer" in types:
            known = set("".join([*added, *(_normalized(tokenizer, text) for text in added)]))
            patterns += [f"[{re.escape(mark)}]" for mark in string.punctuation if mark not in known]
            if any(
                part["type"] == "BertNormalizer" and part["handle_chinese_chars"]
                for part in normalizers
            ) and not re.search(f"[{CHINESE}]", "".join(known)):
                patterns.append(f"[{CHINESE}]")
        return cls(re.compile("|".join(patterns))) if patterns else None

    def cut(self, text: str, chars: int, side: Side) -> str | None:
        """Return about `chars` characters of a text; None if there is no place to cut.

        They are of its beginning for `right`, of its end for `left`.
        """
        if side == "left":
            match = self.pattern.search(text, len(text) - chars, len(text) - chars // 2)
            return None if match is None else text[match.start() :]
        end = None
        for match in self.pattern.finditer(text, chars // 2, chars):
            end = match.start()
        return None if end is None else text[:end]


def reliable(offsets: Sequence[tuple[int, int]], chars: int, side: Side) -> int:
    """Return how many tokens of a cut text are those of the whole text.

    They are counted from the end that was not cut. `offsets` are each token's (start, end) in a
    text of `chars` characters.
    """
    if side == "right":
        return sum(end <= chars - MARGIN_CHARS for _, end in offsets)
    return sum(begin >= MARGIN_CHARS for begin, _ in offsets)


def _parts(component: Any) -> list[dict[str, Any]]:
    """Return the parts of a component, as tokenizer.json describes them."""
    if component is None:
        return []
    return list(_flat(json.loads(component.__getstate__())))


def _flat(described: dict[str, Any]) -> Iterable[dict[str, Any]]:
    inner = described.get("normalizers") or described.get("pretokenizers")
    if described["type"] != "Sequence":
        yield described
    for part in inner or []:
        yield from _flat(part)


def _is_local(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        pattern: dict[str, str] = normalizer["pattern"]
        return (
            len(pattern.get("String", "")) <= MAX_ADDED_CHARS
            and pattern.get("Regex", " {2,}") in REPLACED
        )
    return normalizer["type"] in NORMALIZERS


def _is_by_word(model: Any) -> bool:
    """Return whether a model's tokens of a word depend on the word alone."""
    if isinstance(model, BPE):
        return not model.dropout
    return isinstance(model, WordPiece | Unigram | WordLevel)


def _splits(tokenizer: Tokenizer, space: str) -> bool:
    """Return whether words end at that character."""
    text = _normalized(tokenizer, f"a{space}b")
    return (
        tokenizer.pre_tokenizer is not None
        and len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) > 1
    )


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    normalized: str = (
        text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
    )
    return normalized
