"""
Shows, before a model's first request, that this host answers as the exporting host did.

Export verifies a variant on one processor; engines choose their code by the processor they find,
and have been wrong on one kind alone. So the manifest holds a few texts (`probes`), what the model
reads of each, and the logits that every variant answered. The host that serves computes them again,
each text alone and all in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.artifact import Probe
from service.classifier import Classifier, Encoded
from service.errors import ModelOutputInvalid
from service.host import cpus
from service.runtimes import Logits, RuntimeUnavailable


class AnswersDiffer(RuntimeUnavailable):
    """This host answers otherwise than the one that exported the variant."""


@dataclass(frozen=True)
class Agreement:
    """The outcome of a self-check that passed."""

    texts: int
    largest_difference: float
    """Of a logit, alone or in a batch."""
    tolerance: float


def check(classifier: Classifier, variant: str) -> Agreement | None:
    """Compare this host's answers with those in the manifest; None if it holds none.

    Raises AnswersDiffer, which names the processor and the variant, if tokens differ or logits
    differ by more than the tolerance.
    """
    manifest, runtime = classifier.manifest, classifier.runtime
    recorded = manifest.variants[variant].self_check
    if recorded is None or not manifest.probes:
        return None
    where = "this GPU" if runtime.device != "CPU" else f"this processor ({cpus.describe()})"
    expected = recorded.logits.get(runtime.computes_in)  # type: ignore[call-overload]
    if expected is None:
        raise AnswersDiffer(
            f"{variant} was verified in {' and '.join(recorded.logits)}, and {where} computes it in"
            f" {runtime.computes_in}; export it on a machine of this kind, or choose another"
            " --variant."
        )
    for probe in manifest.probes:
        if list(classifier.encode(probe.text, probe.text_pair).ids) != probe.input_ids:
            raise AnswersDiffer(
                "The tokenizer reads a text of the self-check differently here than where it was"
                " exported; install the version of tokenizers that constraints.txt names, or export"
                " again."
            )
    try:
        alone, batched = answers(classifier, manifest.probes)
    except (
        RuntimeError,
        ModelOutputInvalid,
    ) as error:  # OpenVINO raises RuntimeError, whatever is wrong.
        why = (str(error).strip().splitlines() or [""])[-1]
        raise AnswersDiffer(
            f"{variant} cannot compute the self-check on {where} ({type(error).__name__}: {why})."
            " Choose another --variant."
        ) from error
    wanted = np.array(expected, np.float32)
    difference = max(float(np.abs(alone - wanted).max()), float(np.abs(batched - wanted).max()))
    if not difference <= recorded.tolerance:
        raise AnswersDiffer(
            f"{variant} answers differently on {where} than where it was exported: a logit differs"
            f" by {difference:.2g}, and at most {recorded.tolerance:.2g} is rounding. Choose"
            " another --variant, or export it on a machine of this kind."
        )
    return Agreement(len(manifest.probes), difference, recorded.tolerance)


def answers(classifier: Classifier, probes: Sequence[Probe]) -> tuple[Logits, Logits]:
    """Return the logits of each probe alone and of all in batches, (probes, labels) each; the same
    twice if padding changes answers.
    """
    encoded = [Encoded(probe.input_ids, probe.token_type_ids, False) for probe in probes]
    alone = np.concatenate([classifier.predict([text]) for text in encoded])
    if not classifier.padding_safe:
        return alone, alone
    batched = np.empty_like(alone)
    for places in classifier.batches([text.tokens for text in encoded]):
        batched[places] = classifier.predict([encoded[place] for place in places])
    return alone, batched
