"""
Zero-shot classification: labels that a request names, judged by a model of natural language
inference.

Each label becomes a hypothesis, such as "This example is sports.", and makes a pair with the text.
The logits of entailment and contradiction give the label's score, as in the zero-shot pipeline of
transformers (the method of Yin, Hay and Roth, arXiv:1909.00161).
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

from service.artifact import Manifest
from service.errors import InvalidInput

TEMPLATE = "This example is {}."
PLACE = "{}"
"""Where a template holds the label."""
MAX_HYPOTHESIS_CHARS = 1_000
"""Characters of a label in its template; it has to fit into the model together with the text."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a request wants to know of its texts."""

    labels: tuple[str, ...]
    template: str = TEMPLATE
    multi_label: bool = False
    """Whether each label may apply by itself; otherwise their scores add up to 1."""
    entailment_label: str | None = None
    """The model's label for entailment; None: the one that is named so."""
    contradiction_label: str | None = None

    def __post_init__(self) -> None:
        """Raise InvalidInput unless every label makes a hypothesis of its own."""
        before, after = self._around_label()
        if not self.labels:
            raise InvalidInput("labels is an empty list; give at least one label.", param="labels")
        seen: set[str] = set()
        for place, label in enumerate(self.labels):
            field = f"labels[{place}]"
            if not label.strip():
                raise InvalidInput(
                    f"{field} is empty; it must hold at least one visible character.", param=field
                )
            if label in seen:
                raise InvalidInput(f"{field} repeats an earlier label.", param=field)
            seen.add(label)
            chars = len(before) + len(label) + len(after)
            if chars > MAX_HYPOTHESIS_CHARS:
                raise InvalidInput(
                    f"{field} has {chars} characters in its template, the limit is"
                    f" {MAX_HYPOTHESIS_CHARS}.",
                    param=field,
                )

    @property
    def hypotheses(self) -> list[str]:
        """The hypothesis of each label."""
        before, after = self._around_label()
        return [f"{before}{label}{after}" for label in self.labels]

    def _around_label(self) -> tuple[str, str]:
        """Return what the template puts before and after the label; raises InvalidInput.

        It is read as Python's str.format reads it, as in transformers' pipeline: {{ is a brace.
        The label is not passed to str.format, which would evaluate what stands in the braces.
        """
        try:
            pieces = list(Formatter().parse(self.template))
        except ValueError:
            pieces = []
        places = [place for place, piece in enumerate(pieces) if piece[1] is not None]
        is_plain = all(
            piece[1] in (None, "", "0") and not piece[2] and piece[3] is None for piece in pieces
        )
        if len(places) != 1 or not is_plain:
            raise InvalidInput(
                f"hypothesis_template must hold {PLACE} once, where the label belongs; a brace of"
                " its own is written twice.",
                param="hypothesis_template",
            )
        texts = [piece[0] for piece in pieces]
        return "".join(texts[: places[0] + 1]), "".join(texts[places[0] + 1 :])

    def places(self, manifest: Manifest) -> tuple[int, int]:
        """Return the indices of entailment and contradiction among the model's labels.

        Raises InvalidInput if the model is none of natural language inference, or lacks a label
        that the request names.
        """
        if not can_answer(manifest):
            raise InvalidInput(
                "The model cannot judge labels: it must read pairs and choose one of several labels"
                f" (it has {len(manifest.labels)}, its task is {manifest.task}). /info lists the"
                " tasks of each model.",
                param="model",
            )
        entailment = _place(manifest, self.entailment_label, "entailment_label")
        if entailment is None:
            entailment = _named(manifest, "entail")
        if entailment is None:
            raise InvalidInput(
                f"None of the model's labels ({', '.join(manifest.labels[:10])}) is named"
                " entailment. Choose a model of natural language inference (/info lists the tasks"
                " of each model), or name its label with entailment_label in POST /classify.",
                param="model",
            )
        contradiction = _place(manifest, self.contradiction_label, "contradiction_label")
        if contradiction is None and (named := _named(manifest, "contra")) != entailment:
            contradiction = named
        if contradiction is None:
            # As in transformers: the first label, or the last one if the first is entailment.
            contradiction = len(manifest.labels) - 1 if entailment == 0 else 0
        if contradiction == entailment:
            raise InvalidInput(
                f"contradiction_label is the model's label for entailment,"
                f" {manifest.labels[entailment]!r}.",
                param="contradiction_label",
            )
        return entailment, contradiction


def can_answer(manifest: Manifest) -> bool:
    """Return whether a model may judge labels if it is told what its own labels mean."""
    return manifest.takes_pairs and manifest.task == "single_label" and len(manifest.labels) > 1


def knows_entailment(manifest: Manifest) -> bool:
    """Return whether a model has a label that is named entailment, and may judge labels."""
    return can_answer(manifest) and _named(manifest, "entail") is not None


def _named(manifest: Manifest, beginning: str) -> int | None:
    """Return the place of the first label whose name has this beginning."""
    names = (label.lower() for label in manifest.labels)
    return next((place for place, name in enumerate(names) if name.startswith(beginning)), None)


def _place(manifest: Manifest, label: str | None, field: str) -> int | None:
    if label is None:
        return None
    if label not in manifest.labels:
        raise InvalidInput(
            f"{field} is not a label of the model; its labels are"
            f" {', '.join(manifest.labels[:10])}{', …' if len(manifest.labels) > 10 else ''}.",
            param=field,
        )
    return manifest.labels.index(label)
