"""
Cutting texts to a model's length, with the results of tokenizers' own truncation.

A tokenizer keeps its truncation as state, so that one for every kind of truncation would be needed:
three vocabularies in memory, and three times the load during which nothing else runs. Here the
tokens are cut instead.

A text that is far longer than the model reads is cut before it is tokenized, at a place where both
tokenizations are the same on one side of it.
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

Side = Literal["right", "left"]

# Tokens so near to a cut are not used: they may have characters of an added token, a grapheme or a
# word from the other side.
MARGIN_CHARS = 256
# The first attempt has so many characters for each token that is wanted, each further one GROWTH
# times as many.
CHARS_PER_TOKEN = 8
GROWTH = 4

# Components that decide about a character by those next to it. The others, and whatever a newer
# tokenizers adds, may look at the whole text.
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
# The longest added token that MARGIN_CHARS has room for.
MOST_CHARS = MARGIN_CHARS // 2


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of a pair's halves stay: the longer half is cut to the other's length before
    both are cut.
    """
    if first + second <= room:
        return first, second
    shorter, longer = sorted((first, second))
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter = room // 2
        longer = shorter + room % 2
    return (longer, shorter) if first > second else (shorter, longer)


def kept_of_pair(encoding: Encoding, room: int, side: Side) -> list[int]:
    """Places of the tokens that stay when the halves of a pair may have `room` tokens, special
    tokens among them.
    """
    halves: tuple[list[int], list[int]] = ([], [])
    special: list[int] = []
    for place, half in enumerate(encoding.sequence_ids):
        (special if half is None else halves[half]).append(place)
    kept = special
    for places, count in zip(
        halves, longest_first(len(halves[0]), len(halves[1]), room), strict=True
    ):
        kept += places[:count] if side == "right" else places[len(places) - count :]
    return sorted(kept)


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Where a text may be cut so that the tokens before the place, and those behind it, are tokens
    of the whole text.
    """

    places: re.Pattern[str]
    """Matches the first character behind a cut. No word and no added token reaches across it."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Boundaries | None:
        """Those of a tokenizer; None where they are not known to exist."""
        normalizers, pre_tokenizers = _parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)
        types = {part["type"] for part in pre_tokenizers}
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        if not (
            all(map(_is_local, normalizers))
            and types <= PRE_TOKENIZERS
            and _is_by_word(tokenizer.model)
        ):
            return None
        if any(len(text) > MOST_CHARS or re.search(r"\s", text) for text in added):
            return None
        spaces = "".join(space for space in WHITESPACE if _splits(tokenizer, space))
        # The first of a run of white space, because a run may be one token.
        places = [rf"(?<=\S)[{spaces}]"] if spaces else []
        if "BertPreTokenizer" in types:
            known = set("".join([*added, *(_normalized(tokenizer, text) for text in added)]))
            places += [f"[{re.escape(mark)}]" for mark in string.punctuation if mark not in known]
            if any(
                part["type"] == "BertNormalizer" and part["handle_chinese_chars"]
                for part in normalizers
            ) and not re.search(f"[{CHINESE}]", "".join(known)):
                places.append(f"[{CHINESE}]")
        return cls(re.compile("|".join(places))) if places else None

    def cut(self, text: str, chars: int, side: Side) -> str | None:
        """About so many characters of a text, of its beginning for `right` and of its end for
        `left`; None if there is no place to cut.
        """
        if side == "left":
            found = self.places.search(text, len(text) - chars, len(text) - chars // 2)
            return None if found is None else text[found.start() :]
        place = None
        for found in self.places.finditer(text, chars // 2, chars):
            place = found.start()
        return None if place is None else text[:place]


def reliable(offsets: Sequence[tuple[int, int]], chars: int, side: Side) -> int:
    """How many tokens of a cut text are those of the whole text, counted from the end that was not
    cut.
    """
    if side == "right":
        return sum(end <= chars - MARGIN_CHARS for _, end in offsets)
    return sum(begin >= MARGIN_CHARS for begin, _ in offsets)


def _parts(component: Any) -> list[dict[str, Any]]:
    """What a component is made of, as tokenizer.json describes it."""
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
            len(pattern.get("String", "")) <= MOST_CHARS
            and pattern.get("Regex", " {2,}") in REPLACED
        )
    return normalizer["type"] in NORMALIZERS


def _is_by_word(model: Any) -> bool:
    """Whether a model's tokens of a word depend on nothing but the word."""
    if isinstance(model, BPE):
        return not model.dropout
    return isinstance(model, WordPiece | Unigram | WordLevel)


def _splits(tokenizer: Tokenizer, space: str) -> bool:
    """Whether words end at that character."""
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
