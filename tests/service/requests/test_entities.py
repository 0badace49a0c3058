"""Entities of tokens, and tokens of windows; tests/export/test_token_labels.py has real models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from service.requests.entities import Labelling, Offsets, Strategy, joined_windows

LABELS = ("O", "B-PER", "I-PER")


class Words:
    """A vocabulary of WordPiece, in which a token is its own id's place."""

    unknown: int | None = 0
    marks_continuations = True

    def __init__(self, *tokens: str) -> None:
        self._tokens = ("[UNK]", *tokens)

    def token(self, token_id: int) -> str:
        return self._tokens[token_id]

    def join(self, tokens: Sequence[str]) -> str:
        return " ".join(tokens).replace(" ##", "")


def logits(*labels: str, strength: float = 5.0) -> np.ndarray:
    """Return logits of tokens with these labels."""
    return np.array([[strength * (name == label) for name in LABELS] for label in labels])


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("none", [("B-PER", "ad"), ("I-PER", "lov")]),
        ("simple", [("PER", "ad"), ("PER", "lov")]),
        ("first", [("PER", "ada lov")]),
    ],
)
def test_a_word_that_its_tokens_disagree_about(
    strategy: Strategy, expected: list[tuple[str, str]]
) -> None:
    text = "ada lov"
    entities = Labelling(strategy).entities(
        text,
        [0, 1, 2, 3, 0],
        Offsets.of([(0, 2), (2, 3), (4, 7)], 1, 1),
        logits("O", "B-PER", "O", "I-PER", "O"),
        LABELS,
        Words("ad", "##a", "lov"),
    )
    assert [(each.label, text[each.start : each.end]) for each in entities] == expected


def test_neighbours_of_one_label_are_one_entity_until_another_begins() -> None:
    text = "ada bob eve"
    rows = logits("B-PER", "I-PER", "B-PER")
    entities = Labelling().entities(
        text,
        [1, 2, 3],
        Offsets.of([(0, 3), (4, 7), (8, 11)]),
        rows,
        LABELS,
        Words("ada", "bob", "eve"),
    )
    assert [text[entity.start : entity.end] for entity in entities] == ["ada bob", "eve"]
    assert [entity.word for entity in entities] == ["ada bob", "eve"]


def test_an_unknown_word_has_the_letters_of_the_text() -> None:
    [entity] = Labelling("first").entities(
        "Łódź", [0], Offsets.of([(0, 4)]), logits("B-PER"), LABELS, Words()
    )
    assert entity.word == "Łódź"


def window(first: int, tokens: int) -> np.ndarray:
    """Return the logits of a window with a special token at each end: window, token."""
    rows = [[-1.0, -1.0], *([float(first), float(first + i)] for i in range(tokens)), [-1.0, -1.0]]
    return np.array(rows)


def test_a_token_is_taken_from_the_window_in_which_it_is_furthest_from_an_edge() -> None:
    merged = joined_windows([window(0, 6), window(4, 6), window(8, 4)], [0, 4, 8], 1, 1)
    assert merged[:, 1].tolist() == [-1, *range(12), -1]
    # The ends of the text are no edges.
    assert merged[1:-1, 0].tolist() == [0, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8]


def test_an_entity_that_reaches_over_two_windows_is_one() -> None:
    words = Words(*"abcdef")
    text = "a b c d e f"
    special = logits("O")
    first = np.concatenate([special, logits("O", "O", "B-PER", "I-PER"), special])
    second = np.concatenate([special, logits("I-PER", "I-PER", "I-PER", "O"), special])
    rows = joined_windows([first, second], [0, 2], 1, 1)
    offsets = Offsets.of([(2 * i, 2 * i + 1) for i in range(6)], 1, 1)
    ids = [0, 1, 2, 3, 4, 5, 6, 0]
    [entity] = Labelling().entities(text, ids, offsets, rows, LABELS, words)
    assert text[entity.start : entity.end] == "c d e"


def test_one_window_is_the_whole_text() -> None:
    assert joined_windows([window(0, 3)], [0], 1, 1)[:, 1].tolist() == [-1, 0, 1, 2, -1]


def test_of_two_certain_tokens_the_first_counts() -> None:
    rows = np.array([[0.0, 20.0, 0.0], [0.0, 0.0, 25.0]], np.float32)
    [entity] = Labelling("max").entities(
        "ada",
        [1, 2],
        Offsets.of([(0, 2), (2, 3)]),
        rows,
        ("O", "B-PER", "I-LOC"),
        Words("ad", "##a"),
    )
    assert entity.label == "PER"
