"""A column of few words behaves as an array of text does."""

from __future__ import annotations

import numpy as np
import pytest

from proof.evidence.categorical import Categorical

TEXT = np.array(["bert", "drbert", "bert", "slow"])


@pytest.fixture
def words() -> Categorical:
    # A word may be known that no row has: rows were chosen from a longer column.
    return Categorical(["slow", "never", "bert", "drbert"], np.array([2, 3, 2, 0]))


@pytest.mark.parametrize("word", ["bert", "slow", "never", "unheard of"])
def test_comparing_with_a_word_marks_where_it_is(words: Categorical, word: str) -> None:
    assert ((words == word) == (word == TEXT)).all()
    assert ((words != word) == (word != TEXT)).all()


def test_columns_with_other_codes_compare_by_their_words(words: Categorical) -> None:
    other = Categorical(["drbert", "bert", "else"], np.array([1, 0, 2, 2]))
    assert (words == other).tolist() == [True, True, False, False]
    assert (other == words).tolist() == [True, True, False, False]


def test_choosing_gives_fewer_rows_or_one_word(words: Categorical) -> None:
    assert words[1] == "drbert"
    assert words[np.array([True, False, True, False])].unique() == ["bert"]
    assert len(words[1:3]) == 2
    assert words.unique() == ["bert", "drbert", "slow"]


def test_isin_knows_several_words_and_ignores_strangers(words: Categorical) -> None:
    assert words.isin(["slow", "drbert", "unheard of"]).tolist() == [False, True, False, True]


def test_a_column_without_rows_has_no_words() -> None:
    nothing = Categorical([], np.array([], np.int64))
    assert nothing.unique() == []
    assert (nothing == "bert").tolist() == []
