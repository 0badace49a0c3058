"""
Compares the answers of two servers, text by text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from client.compare.formats import Answer

NORMAL_95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


NUMBER_TOLERANCE = 0.02
"""Difference of two numbers that count as the same answer, as a share of the old one or of 1."""
COUNTED = 0.5
"""Score from which a label of a multi-label model counts."""
ONE_LABEL_SUM = 1.01
"""Largest sum of the scores of a model that chooses one label; they are its probabilities."""


@dataclass(frozen=True)
class DifferingText:
    """A text that got two different answers."""

    index: int
    """Line in the file of texts, from 1."""
    text: str
    old: str
    """Label and score, all that count of a multi-label model, or why there is no answer."""
    new: str


@dataclass(frozen=True)
class Agreement:
    """How far two servers agree on the same texts."""

    texts: int
    """Number of texts that both were asked for."""
    same: int
    """Number of texts to which both gave the same answer."""
    failed_old: int
    """Number of texts that the old server did not answer."""
    failed_new: int
    largest_difference: float
    """Largest difference of two scores of one label on one text; NaN without any."""
    largest_text: int
    """Line of that text, from 1; 0 without any."""
    differing: Sequence[DifferingText]
    """The texts with two different answers, or with an answer from one server only."""
    labels_old: Sequence[str]
    """Labels that the old server gave, sorted."""
    labels_new: Sequence[str]

    @property
    def share(self) -> float:
        """Share of the texts that got the same answer, 0 to 1."""
        return self.same / self.texts

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share."""
        return wilson_interval(self.same, self.texts)

    @property
    def has_foreign_labels(self) -> bool:
        """Whether the two servers have no label in common, so they may name them differently."""
        return bool(self.labels_old and self.labels_new) and not (
            set(self.labels_old) & set(self.labels_new)
        )


def compare_answers(
    texts: Sequence[tuple[int, str]],
    old: Sequence[Answer | str],
    new: Sequence[Answer | str],
    renamed: Mapping[str, str],
) -> Agreement:
    """Compare two servers' answers for the same texts; a string says why there is no answer.

    `texts` are (line, text). Two texts got the same answer if they got the same label. A server
    whose answers all have one label and one score gives numbers, which are compared within
    NUMBER_TOLERANCE. Of a multi-label model, all labels that count are compared.
    `renamed` maps labels of the old server to those of the new one.
    """
    is_same, described = _same_label, _describe
    if _are_numbers(old) and _are_numbers(new):
        is_same = _same_number
    elif _are_multi_label(old) and _are_multi_label(new):
        is_same, described = _same_counted, _describe_counted
    differing: list[DifferingText] = []
    largest, largest_text = math.nan, 0
    same = 0
    for (i, text), left, right in zip(texts, old, new, strict=True):
        if isinstance(left, Answer):
            left = _rename(left, renamed)
        if isinstance(left, Answer) and isinstance(right, Answer) and is_same(left, right):
            same += 1
        else:
            differing.append(DifferingText(i, text, described(left), described(right)))
        if isinstance(left, Answer) and isinstance(right, Answer):
            difference = score_difference(left, right)
            if not difference <= largest and not math.isnan(difference):
                largest, largest_text = difference, i
    return Agreement(
        texts=len(texts),
        same=same,
        failed_old=sum(isinstance(each, str) for each in old),
        failed_new=sum(isinstance(each, str) for each in new),
        largest_difference=largest,
        largest_text=largest_text,
        differing=sorted(differing, key=lambda item: item.index),
        labels_old=_labels(old, renamed),
        labels_new=_labels(new, {}),
    )


def _are_numbers(answers: Sequence[Answer | str]) -> bool:
    """Return whether a server gives numbers: a regression's one label says nothing."""
    answered = [answer for answer in answers if isinstance(answer, Answer)]
    return all(len(answer.scores) == 1 for answer in answered) and (
        len({answer.label for answer in answered}) == 1
    )


def _are_multi_label(answers: Sequence[Answer | str]) -> bool:
    """Return whether a server scores each label on its own: the scores add up to more than 1."""
    return any(
        isinstance(answer, Answer)
        and sum(answer.scores.values()) > ONE_LABEL_SUM
        and all(0 <= score <= 1 for score in answer.scores.values())
        for answer in answers
    )


def _same_label(old: Answer, new: Answer) -> bool:
    return old.label == new.label


def _same_number(old: Answer, new: Answer) -> bool:
    left, right = best_score(old), best_score(new)
    return abs(left - right) <= NUMBER_TOLERANCE * max(1.0, abs(left))


def _same_counted(old: Answer, new: Answer) -> bool:
    return counted_labels(old) == counted_labels(new)


def counted_labels(answer: Answer) -> set[str]:
    """Return the labels of a multi-label model's answer that count."""
    return {label for label, score in answer.scores.items() if score >= COUNTED}


def score_difference(old: Answer, new: Answer) -> float:
    """Return the largest difference of the scores of one label; NaN if there is no such label."""
    common = old.scores.keys() & new.scores.keys()
    if common:
        return max(abs(old.scores[label] - new.scores[label]) for label in common)
    # Labels without names in one of the answers: its best score is that of its label.
    if old.label == new.label:
        return abs(best_score(old) - best_score(new))
    return math.nan


def best_score(answer: Answer) -> float:
    """Return the score of an answer's label."""
    return answer.scores.get(answer.label, max(answer.scores.values()))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (E. B. Wilson 1927)."""
    z2 = NORMAL_95**2
    share = successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = (
        NORMAL_95
        / (1 + z2 / trials)
        * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    )
    low = 0.0 if successes == 0 else centre - spread
    return low, 1.0 if successes == trials else centre + spread


def _rename(answer: Answer, renamed: Mapping[str, str]) -> Answer:
    scores = {renamed.get(label, label): score for label, score in answer.scores.items()}
    return Answer(renamed.get(answer.label, answer.label), scores)


def _labels(answers: Sequence[Answer | str], renamed: Mapping[str, str]) -> list[str]:
    labels = {answer.label for answer in answers if isinstance(answer, Answer)}
    return sorted(renamed.get(label, label) for label in labels)


def _describe(answer: Answer | str) -> str:
    return answer if isinstance(answer, str) else f"{answer.label} {best_score(answer):.4f}"


def _describe_counted(answer: Answer | str) -> str:
    if isinstance(answer, str):
        return answer
    counted = sorted(counted_labels(answer), key=lambda label: -answer.scores[label])
    return ", ".join(f"{label} {answer.scores[label]:.4f}" for label in counted) or "no label"
