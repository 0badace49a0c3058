"""
Entities of a text, from its tokens' logits.

Neighbouring tokens of one label become one entity, as in the token-classification pipeline of
transformers (TokenClassificationPipeline), with its strategies where the tokens of a word differ:

    none     every token by itself
    simple   by the label of each token; a word may be divided
    first    a word has the label of its first token
    average  … of the highest mean score of its tokens
    max      … of its token with the highest score
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

Strategy = Literal["none", "simple", "first", "average", "max"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
OUTSIDE = "O"
"""The label of tokens that are no entity, by convention."""

SPECIAL = -1
"""Stands for the characters of a special token."""


@dataclass(frozen=True, slots=True)
class Offsets:
    """The characters of a text's tokens; arrays, because thousands of texts may wait."""

    starts: array[int]
    """The first character of each token, or SPECIAL."""
    ends: array[int]
    """The character after its last one, or SPECIAL."""

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int]], before: int = 0, after: int = 0) -> Offsets:
        """Return the offsets of tokens with special ones before and after them."""
        first, last = [SPECIAL] * before, [SPECIAL] * after
        return cls(
            array("i", [*first, *(start for start, _ in spans), *last]),
            array("i", [*first, *(end for _, end in spans), *last]),
        )


class Vocabulary(Protocol):
    """What the strategies need of a tokenizer."""

    @property
    def unknown(self) -> int | None:
        """Id of the token that stands for an unknown word."""
        ...

    @property
    def marks_continuations(self) -> bool:
        """Whether a token that continues a word has a prefix, as WordPiece's `##`."""
        ...

    def token(self, token_id: int, /) -> str:
        """Return a token as the vocabulary holds it."""
        ...

    def join(self, tokens: Sequence[str], /) -> str:
        """Return the text of several tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Entity:
    """A part of a text with its label."""

    label: str
    score: float
    word: str
    """The text as the tokenizer decodes it; lower case, for example."""
    start: int
    """Its first character in the text."""
    end: int
    """The character after its last one."""
    index: int | None = None
    """The token's index in the text, special tokens included; None for several tokens."""


@dataclass(frozen=True, slots=True)
class _Token:
    index: int
    word: str
    start: int
    end: int
    continues: bool
    """Whether it continues the word of the token before it."""
    scores: npt.NDArray[np.float32]
    """The probability of each label."""


@dataclass(frozen=True, slots=True)
class Labelling:
    """How the entities of a request's texts are found."""

    strategy: Strategy = "simple"
    ignored: Collection[str] = (OUTSIDE,)
    """Labels of which nothing is said."""

    def entities(
        self,
        text: str,
        ids: Sequence[int],
        offsets: Offsets,
        logits: npt.NDArray[Any],
        labels: Sequence[str],
        vocabulary: Vocabulary,
    ) -> list[Entity]:
        """Return a text's entities in their order, from the logits of its tokens.

        `logits` are (tokens, labels), special tokens included.
        """
        tokens = list(_tokens(text, ids, offsets, logits, vocabulary))
        if self.strategy in ("none", "simple"):
            entities = [_entity([token], token.word, token.scores, labels) for token in tokens]
        else:
            entities = [
                _entity(word, vocabulary.join([token.word for token in word]), scores, labels)
                for word in _words(tokens)
                for scores in (_scores(word, self.strategy),)
            ]
        if self.strategy != "none":
            entities = [_joined(group, vocabulary) for group in _groups(entities)]
        return [entity for entity in entities if entity.label not in self.ignored]


def _tokens(
    text: str,
    ids: Sequence[int],
    offsets: Offsets,
    logits: npt.NDArray[Any],
    vocabulary: Vocabulary,
) -> Iterator[_Token]:
    """Yield the tokens of a text, without the special ones."""
    scores = probabilities(logits)
    places = zip(ids, offsets.starts, offsets.ends, strict=True)
    for index, (token_id, start, end) in enumerate(places):
        if start == SPECIAL:
            continue
        word, covered = vocabulary.token(token_id), text[start:end]
        if token_id == vocabulary.unknown:
            word, continues = covered, False
        elif vocabulary.marks_continuations:
            continues = len(word) != len(covered)  # by the length of its prefix
        else:
            continues = start > 0 and " " not in text[start - 1 : start + 1]
        yield _Token(index, word, start, end, continues, scores[index])


def probabilities(logits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the softmax of each token's logits, (tokens, labels).

    It is of 32 bits, as in transformers: where two scores are both 1, the first token's counts.
    """
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float32)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def _words(tokens: Sequence[_Token]) -> list[list[_Token]]:
    """Return the tokens by words."""
    words: list[list[_Token]] = []
    for token in tokens:
        if words and token.continues:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _scores(word: Sequence[_Token], strategy: Strategy) -> npt.NDArray[np.float32]:
    """Return the scores of a word's labels."""
    if strategy == "average":
        mean: npt.NDArray[np.float32] = np.mean([token.scores for token in word], axis=0)
        return mean
    if strategy == "max":
        return max(word, key=lambda token: float(token.scores.max())).scores
    return word[0].scores


def _entity(
    tokens: Sequence[_Token], word: str, scores: npt.NDArray[np.float32], labels: Sequence[str]
) -> Entity:
    best = int(scores.argmax())
    index = tokens[0].index if len(tokens) == 1 else None
    return Entity(labels[best], float(scores[best]), word, tokens[0].start, tokens[-1].end, index)


def _groups(entities: Sequence[Entity]) -> list[list[Entity]]:
    """Return neighbours of one label together; a label with the prefix B- begins a new group."""
    groups: list[list[Entity]] = []
    for entity in entities:
        begins, name = _parts(entity.label)
        if groups and not begins and name == _parts(groups[-1][-1].label)[1]:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups


def _parts(label: str) -> tuple[bool, str]:
    """Return whether a label has the prefix B-, and its name without B- or I-."""
    return label.startswith("B-"), label.removeprefix("B-" if label.startswith("B-") else "I-")


def _joined(group: Sequence[Entity], vocabulary: Vocabulary) -> Entity:
    return Entity(
        # What transformers cuts off here is everything before a hyphen.
        group[0].label.split("-", 1)[-1],
        sum(entity.score for entity in group) / len(group),
        vocabulary.join([entity.word for entity in group]),
        group[0].start,
        group[-1].end,
    )


def joined_windows(
    windows: Sequence[npt.NDArray[Any]], starts: Sequence[int], before: int, after: int
) -> npt.NDArray[Any]:
    """Return the logits of a long text's tokens, (tokens, labels), from those of its windows.

    `starts` are the first tokens of the windows in the text; each window has `before` special
    tokens before its own tokens, and `after` after them, and so has the result. A token that
    several windows have is taken from the one in which it is furthest from an edge, as it sees most
    of the text there.
    """
    parts = [window[before : len(window) - after] for window in windows]
    tokens = starts[-1] + len(parts[-1])
    rows = np.empty((tokens, parts[0].shape[1]), parts[0].dtype)
    nearest_edge = np.full(tokens, -1)
    for start, part in zip(starts, parts, strict=True):
        places = np.arange(len(part))
        # The ends of the text are no edges.
        left = places if start else np.full(len(part), tokens)
        is_last = start + len(part) == tokens
        right = np.full(len(part), tokens) if is_last else places[::-1]
        edge = np.minimum(left, right)
        better = edge > nearest_edge[start : start + len(part)]
        rows[start : start + len(part)][better] = part[better]
        nearest_edge[start : start + len(part)][better] = edge[better]
    last = windows[-1]
    return np.concatenate([windows[0][:before], rows, last[len(last) - after :]])
