"""
Ratios by text: whether single texts, or long ones, differ where the statistics of all do not.

They describe a run and decide nothing. The yardstick is A/A, the second copy of each model over its
first, which scatters as much as the difference of the models does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from proof.evidence.readings import latencies_us
from proof.evidence.statistics import Matrix
from proof.evidence.store import at_level
from proof.plans.plan import Level, Plan, Role
from proof.plans.schedule import PLAIN

FEWEST_US = 1e-3
"""Shortest latency whose log is taken."""


@dataclass(frozen=True)
class FurthestText:
    """The text whose median log ratio is furthest from 0, and the trend over all texts."""

    median: float
    """Its median log ratio."""
    text_id: int
    tokens: int
    trend: float | None
    """Change of the log ratio from the shortest to the longest text, by least squares; None if
    lengths are unknown or all equal.
    """


@dataclass(frozen=True)
class LevelTexts:
    """The ratios by text of one level."""

    texts: int
    """Number of different texts."""
    candidate: FurthestText
    """Candidates over references."""
    same_model: FurthestText
    """The second copies over the first, A/A."""


@dataclass
class _Ratios:
    """Log ratios of one level's plain blocks, an array for each restart."""

    text_ids: list[npt.NDArray[np.int64]] = field(default_factory=list)
    candidate: list[Matrix] = field(default_factory=list)
    same_model: list[Matrix] = field(default_factory=list)


class TextRatios:
    """Collects the ratios by text of a run, restart by restart."""

    def __init__(self, plan: Plan) -> None:
        """Begin without any restart."""
        self._plan = plan
        self._ratios: defaultdict[str, _Ratios] = defaultdict(_Ratios)
        self._tokens: dict[int, int] = {}

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Fewest and most tokens of a text; None if no server reported them."""
        lengths = self._tokens.values()
        return (min(lengths), max(lengths)) if lengths and min(lengths) > 0 else None

    def add(self, rows: Mapping[str, Any]) -> None:
        """Add the rows of one restart that counts."""
        # Texts of the level `repeat` have letters in front of those of the plan.
        is_of_plan = rows["level"].isin([level.name for level in self._plan.judged_levels])
        text_ids, first = np.unique(rows["text_id"][is_of_plan], return_index=True)
        tokens = rows["tokens"][is_of_plan][first]
        self._tokens |= zip(text_ids.tolist(), tokens.tolist(), strict=True)
        for level in self._plan.levels:
            if level.tuples:
                self._add_level(level, at_level(dict(rows), level.name))

    def of_level(self, name: str) -> LevelTexts | None:
        """Return the ratios by text of a level; None where arms are not interleaved."""
        ratios = self._ratios.get(name)
        if ratios is None:
            return None
        text_ids = np.concatenate(ratios.text_ids)
        return LevelTexts(
            texts=len(np.unique(text_ids)),
            candidate=self._furthest(text_ids, np.concatenate(ratios.candidate)),
            same_model=self._furthest(text_ids, np.concatenate(ratios.same_model)),
        )

    def _add_level(self, level: Level, rows: Mapping[str, Any]) -> None:
        metric = "inference" if self._plan.server_timing else "end_to_end"
        logs = np.log(np.maximum(latencies_us(level, metric, rows), FEWEST_US))
        is_plain = rows["slice_id"] == PLAIN
        by_arm: dict[int, Matrix] = {}
        text_ids = np.empty(0, np.int64)
        for arm in self._plan.claimed_arms:
            indices = np.flatnonzero(is_plain & (rows["arm"] == self._plan.arms[arm].name))
            indices = indices[np.argsort(rows["block_id"][indices], kind="stable")]
            by_arm[arm], text_ids = logs[indices], rows["text_id"][indices]

        def pair(role: Role) -> tuple[Matrix, Matrix]:
            first, second = self._plan.indices(role)
            return by_arm[first], by_arm[second]

        reference, second_reference = pair("reference")
        candidate, second_candidate = pair("candidate")
        ratios = self._ratios[level.name]
        ratios.text_ids.append(text_ids)
        ratios.candidate.append((candidate + second_candidate - reference - second_reference) / 2)
        ratios.same_model.append((second_reference + second_candidate - reference - candidate) / 2)

    def _furthest(self, text_ids: npt.NDArray[np.int64], ratios: Matrix) -> FurthestText:
        order = np.argsort(text_ids, kind="stable")
        texts, begins = np.unique(text_ids[order], return_index=True)
        medians = np.array([np.median(part) for part in np.split(ratios[order], begins[1:])])
        furthest = int(np.argmax(np.abs(medians)))
        lengths = np.array([self._tokens[text] for text in texts.tolist()], float)
        return FurthestText(
            median=float(medians[furthest]),
            text_id=int(texts[furthest]),
            tokens=int(lengths[furthest]),
            trend=_trend(lengths, medians),
        )


def _trend(lengths: Matrix, medians: Matrix) -> float | None:
    spread = float(lengths.max() - lengths.min())
    if not spread or lengths.min() <= 0:
        return None
    deviations = lengths - lengths.mean()
    return float(deviations @ medians / (deviations @ deviations)) * spread
