"""
Answers: every row's answer must be the one that its artifact gives.

Where a run starts the servers, answers.json holds the answers of each artifact to each text, from
the verifier: unpacked, one text at a time, without a server (proof/measuring/expected_answers.py).
Servers that others started have no verifier here. Their copies of one model must give one answer
to a text, in every restart.

    label            must be equal. Where the two best scores are closer than twice the tolerance,
                     the second label counts too
    score            of that label, within the tolerance
    score_count      must be equal
    score_checksum   within the tolerance of all scores together
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from command import CommandError
from proof.evidence.audit import loaded_models
from proof.evidence.categorical import Categorical
from proof.evidence.store import EvidenceRejected, RestartRecord
from proof.plans.plan import Plan
from proof.plans.schedule import load_positions

ANSWERS = "answers.json"
MOST_TOLERANCE = 0.1
"""Largest tolerance of a score that a run may state."""
FOREIGN_TOLERANCE = 0.02
"""Tolerance between two answers of a server that others started: that of 16-bit arithmetic."""

Mask = npt.NDArray[np.bool_]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpectedAnswer(_Part):
    """The answer to one text; scores have five digits."""

    label: str
    score: float
    score_count: int
    score_checksum: float
    runner_up: str | None
    """Label with the second highest score; None if there is only one label."""
    runner_up_score: float


class ExpectedModel(_Part):
    """The answers of one artifact, which one or several arms load."""

    artifact: str
    """Digest of the artifact."""
    arms: list[str]
    variant: str
    """The variant that answered, which must be the one that the servers chose."""
    tolerance: float = Field(gt=0, le=MOST_TOLERANCE)
    """Largest difference of a score that counts as rounding; a share of scores above 1."""
    answers: list[ExpectedAnswer]
    """One answer for each text of the plan, in its order."""


class ExpectedAnswers(_Part):
    """The content of answers.json."""

    schema_version: Literal[1]
    texts_sha256: str
    """SHA-256 of texts.txt."""
    models: list[ExpectedModel]


@dataclass(frozen=True)
class AnswerCheck:
    """How many of a run's answers are those of their models."""

    compared: int
    differing: int
    first: str
    """Request id of the first one that differs; empty if none does."""
    tolerance: float
    """The largest tolerance that applied."""
    verified: bool
    """Whether the answers were compared with the verifier's, not only with each other."""
    agreement: float | None
    """Share of the texts to which reference and candidate give one label; None if not known."""


@dataclass
class _Known:
    """The known answers of one model by key, which is a text or a block. All arrays are (keys,)."""

    tolerance: float
    words: list[str]
    """All labels that are known; the codes below are indices into it."""
    is_known: Mask
    label: npt.NDArray[np.int64]
    score: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]
    checksum: npt.NDArray[np.float64]
    runner_up: npt.NDArray[np.int64]
    """The label that counts too, because the two best scores are so close; -1 if there is none."""
    learned: bool = False
    """Whether the answers are those of the run's own first rows."""

    @classmethod
    def nothing(cls, keys: int, tolerance: float) -> _Known:
        """Return a model of which no answer is known."""
        label, count, runner_up = np.full((3, keys), -1)
        score, checksum = np.zeros((2, keys))
        is_known = np.zeros(keys, bool)
        return cls(tolerance, [], is_known, label, score, count, checksum, runner_up, learned=True)

    @classmethod
    def of(cls, model: ExpectedModel) -> _Known:
        """Return the answers of answers.json."""
        answers, tolerance = model.answers, model.tolerance
        words = sorted(
            {each.label for each in answers} | {each.runner_up or "" for each in answers}
        )
        index = {word: i for i, word in enumerate(words)}
        is_close = [
            each.runner_up is not None and each.score - each.runner_up_score <= 2 * tolerance
            for each in answers
        ]
        return cls(
            tolerance,
            words,
            np.ones(len(answers), bool),
            np.array([index[each.label] for each in answers]),
            np.array([each.score for each in answers]),
            np.array([each.score_count for each in answers]),
            np.array([each.score_checksum for each in answers]),
            np.array(
                [
                    index[each.runner_up or ""] if close else -1
                    for each, close in zip(answers, is_close, strict=True)
                ]
            ),
        )

    def learn(self, keys: npt.NDArray[np.int64], rows: Mapping[str, Any]) -> None:
        """Take the first answer to each key that is not known as the model's own."""
        new, first = np.unique(keys, return_index=True)
        first = first[~self.is_known[new]]
        new = keys[first]
        labels: Categorical = rows["label"][first]
        self.words += [word for word in labels.unique() if word not in self.words]
        self.is_known[new] = True
        self.label[new] = labels.codes_in(self.words)
        self.score[new] = rows["score"][first]
        self.count[new] = rows["score_count"][first]
        self.checksum[new] = rows["score_checksum"][first]

    def differs(self, keys: npt.NDArray[np.int64], rows: Mapping[str, Any]) -> Mask:
        """Return where the rows' answers, one for each key, are not the known ones."""
        score, count = self.score[keys], self.count[keys]
        scale = np.maximum(1.0, np.abs(score))
        is_near = np.abs(rows["score"] - score) <= self.tolerance * scale
        # Scores that add up to 1 move by 2 tolerances in all; others, of the sigmoid, each by a
        # quarter of what their logit moves.
        weight = np.maximum(2.0, count / 4) * scale
        is_near &= np.abs(rows["score_checksum"] - self.checksum[keys]) <= self.tolerance * weight
        codes = rows["label"].codes_in(self.words)
        is_label = codes == self.label[keys]
        is_label |= (codes >= 0) & (codes == self.runner_up[keys])
        # Two scores of a softmax can only be close to each other at a half or below.
        if self.learned:
            is_label |= (score <= 0.5 + self.tolerance) & (count > 1)
        is_same = is_near & is_label & (rows["score_count"] == count) & (count > 0)
        return np.asarray(~is_same)


class AnswerAudit:
    """Compares the rows of a run, restart by restart, with the answers that they must hold."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Read answers.json, if there is one; EvidenceRejected if it is not this run's."""
        self._folder = folder
        self._plan = plan
        try:
            self._texts = len(plan.read_texts())
        except CommandError as error:
            raise EvidenceRejected(f"{folder}: {error}") from None
        self._model_of = _models_by_arm(plan)
        self._known: dict[str, _Known] = {}
        expected = _read_expected(folder, plan, self._texts)
        self._is_verified = expected is not None
        for model in expected.models if expected is not None else ():
            self._known |= {self._model_of[name]: _Known.of(model) for name in model.arms}
        self._recorded: bool | None = None
        self._compared = self._differing = 0
        self._first = ""

    def add(self, start: RestartRecord, rows: Mapping[str, Any]) -> None:
        """Compare the rows of a restart that counts."""
        recorded = rows["score_count"] >= 0
        if not len(recorded):
            return
        has_answers = bool(recorded.any())
        if has_answers != bool(recorded.all()) or self._recorded not in (None, has_answers):
            raise EvidenceRejected(f"{self._folder}: some of its rows hold an answer, some do not.")
        self._recorded = has_answers
        if self._plan.starts_servers and has_answers != self._is_verified:
            lacks = ANSWERS if has_answers else "the answers in its rows"
            raise EvidenceRejected(f"{self._folder}: it lacks {lacks}.")
        if not has_answers:
            return
        is_new_text = np.zeros(len(recorded), bool)
        for level in self._plan.levels:
            if level.kind == "repeat":
                is_new_text |= rows["level"] == level.name
        self._compare(start, rows, ~is_new_text)
        if is_new_text.any():
            self._compare_blocks(rows, is_new_text)

    def result(self) -> AnswerCheck | None:
        """Return what was compared; None if the run recorded no answers."""
        if not self._recorded:
            return None
        tolerances = [known.tolerance for known in self._known.values()]
        return AnswerCheck(
            compared=self._compared,
            differing=self._differing,
            first=self._first,
            tolerance=max(tolerances, default=FOREIGN_TOLERANCE),
            verified=self._is_verified,
            agreement=self._agreement(),
        )

    def _compare(self, start: RestartRecord, rows: Mapping[str, Any], chosen: Mask) -> None:
        """Compare answers to texts of the plan."""
        for model, is_model in self._rows_by_model(start, rows).items():
            of_model = _rows_of(rows, chosen & is_model)
            known = self._known.get(model)
            if known is None:
                known = self._known[model] = _Known.nothing(self._texts, FOREIGN_TOLERANCE)
            self._count(known, of_model["text_id"], of_model)

    def _rows_by_model(self, start: RestartRecord, rows: Mapping[str, Any]) -> dict[str, Mask]:
        """Return the rows that each model answered; the delayed arm is one copy or another."""
        positions = load_positions(self._plan, start.slot)
        delayed = [self._plan.arms[i].name for i in self._plan.indices("delayed")]
        is_delayed = rows["arm"].isin(delayed)
        by_model: dict[str, Mask] = {}
        for i, arm in enumerate(self._plan.arms):
            if arm.role == "delayed":
                continue
            is_copy = is_delayed & (rows["load_position"] == positions[i])
            model = self._model_of[arm.name]
            before = by_model.get(model, np.zeros(len(is_copy), bool))
            by_model[model] = before | is_copy | (rows["arm"] == arm.name)
        return by_model

    def _compare_blocks(self, rows: Mapping[str, Any], chosen: Mask) -> None:
        """Compare answers to new texts, which no verifier has seen: repeats with first answers."""
        for arm, model in self._model_of.items():
            of_arm = _rows_of(rows, chosen & (rows["arm"] == arm))
            blocks = of_arm["block_id"]
            known = _Known.nothing(int(blocks.max(initial=0)) + 1, self._known[model].tolerance)
            self._count(known, blocks, of_arm)

    def _count(self, known: _Known, keys: npt.NDArray[np.int64], rows: Mapping[str, Any]) -> None:
        if known.learned and len(keys):
            known.learn(keys, rows)
        differs = known.differs(keys, rows)
        self._compared += len(keys)
        self._differing += int(differs.sum())
        if differs.any() and not self._first:
            self._first = str(rows["request_id"][int(np.flatnonzero(differs)[0])])

    def _agreement(self) -> float | None:
        """Return the share of texts with one label from reference and candidate."""
        arms = [self._plan.arms[self._plan.indices(role)[0]] for role in _COMPARED]
        first, second = (self._known.get(self._model_of[arm.name]) for arm in arms)
        if first is None or second is None:
            return None
        both = first.is_known & second.is_known
        if not both.any():
            return None
        agrees = [
            first.words[a] == second.words[b]
            for a, b in zip(first.label[both], second.label[both], strict=True)
        ]
        return float(np.mean(agrees))


_COMPARED: tuple[Literal["reference", "candidate"], ...] = ("reference", "candidate")


def _models_by_arm(plan: Plan) -> dict[str, str]:
    """Return the model of each copy: its artifact, or its role where others start the servers."""
    return {
        arm.name: arm.artifact or (arm.name if arm.role == "control" else arm.role)
        for arm in plan.arms
        if arm.role != "delayed"
    }


def _rows_of(rows: Mapping[str, Any], chosen: Mask) -> dict[str, Any]:
    names = ("request_id", "text_id", "block_id", "label", "score", "score_count", "score_checksum")
    return {name: rows[name][chosen] for name in names}


def _read_expected(folder: Path, plan: Plan, texts: int) -> ExpectedAnswers | None:
    """Return answers.json; None if the run has none. EvidenceRejected if it is of another run."""
    path = folder / ANSWERS
    if not path.is_file():
        return None
    try:
        expected = ExpectedAnswers.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise EvidenceRejected(f"{path} cannot be read: {place} {problem['msg']}.") from None
    if expected.texts_sha256 != hashlib.sha256(plan.texts.read_bytes()).hexdigest():
        raise EvidenceRejected(f"{path} holds the answers to other texts than texts.txt.")
    loaded = loaded_models(folder) if (folder / "environment.json").exists() else {}
    names = [name for model in expected.models for name in model.arms]
    if sorted(names) != sorted(arm.name for arm in plan.arms if arm.role != "delayed"):
        raise EvidenceRejected(f"{path} holds the answers of other arms than the plan's.")
    for model in expected.models:
        if len(model.answers) != texts:
            raise EvidenceRejected(
                f"{path} holds {len(model.answers)} answers of {model.arms[0]} for {texts} texts."
            )
        _check_loaded(path, model, loaded)
    return expected


def _check_loaded(
    path: Path, model: ExpectedModel, loaded: Mapping[str, Mapping[str, Any]]
) -> None:
    """Reject answers of another artifact or variant than an arm had loaded."""
    for name in model.arms:
        actual = loaded.get(name, {})
        for key, value in (("digest", model.artifact), ("variant", model.variant)):
            if actual.get(key, value) != value:
                raise EvidenceRejected(
                    f"{path} holds the answers of the {key} {value}, arm {name} had loaded"
                    f" {actual[key]}."
                )
