"""
Self-check at start: this host's answers must be those of the exporting host.

Export verifies a variant on one processor. Engines choose their code by the processor, and have
been wrong on one kind alone. So the manifest holds a few texts (`probes`), their token ids, and
every variant's logits. The serving host computes these again before a model's first request, each
text alone and all in a batch.
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
    """Raised where this host's answers differ from those of the exporting host."""


@dataclass(frozen=True)
class Agreement:
    """The outcome of a self-check that passed."""

    texts: int
    """Number of compared texts."""
    largest_difference: float
    """Largest difference of a logit, of a text alone or in a batch."""
    tolerance: float
    """The largest difference that counts as rounding."""


def check(classifier: Classifier, variant: str) -> Agreement | None:
    """Compare this host's answers with those in the manifest; None if it holds none.

    Raises AnswersDiffer, which names the processor and the variant, if tokens differ or logits
    differ by more than the tolerance.
    """
    manifest, runtime = classifier.manifest, classifier.runtime
    recorded = manifest.variants[variant].self_check
    if recorded is None or not manifest.probes:
        return None
    host = "this GPU" if runtime.device != "CPU" else f"this processor ({cpus.describe()})"
    expected = recorded.logits.get(runtime.computes_in)  # type: ignore[call-overload]
    if expected is None:
        raise AnswersDiffer(
            f"{variant} was verified in {' and '.join(recorded.logits)}, and {host} computes it in"
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
    # OpenVINO raises RuntimeError for every failure.
    except (RuntimeError, ModelOutputInvalid) as error:
        reason = (str(error).strip().splitlines() or [""])[-1]
        raise AnswersDiffer(
            f"{variant} cannot compute the self-check on {host} ({type(error).__name__}: {reason})."
            " Choose another --variant."
        ) from error
    verified = np.array(expected, np.float32)
    parts = manifest.parts
    tolerances = recorded.tolerances or [recorded.tolerance] * len(parts)
    largest = 0.0
    for part, tolerance in zip(parts, tolerances, strict=True):
        difference = max(
            float(np.abs(logits - verified)[:, part.columns].max()) for logits in (alone, batched)
        )
        largest = max(largest, difference)
        if not difference <= tolerance:
            raise AnswersDiffer(
                f"{variant} answers differently on {host} than where it was exported: a logit"
                f" differs by {difference:.2g}, and at most {tolerance:.2g} is rounding. Choose"
                " another --variant, or export it on a machine of this kind."
            )
    return Agreement(len(manifest.probes), largest, recorded.tolerance)


def answers(classifier: Classifier, probes: Sequence[Probe]) -> tuple[Logits, Logits]:
    """Return the logits of each probe alone, and of all probes in batches, (probes, labels) each.

    If the model labels tokens, they are those of all tokens of all probes.
    A model that is not padding-invariant is not batched: both are the same then.
    """
    encoded = [Encoded(probe.input_ids, probe.token_type_ids, False) for probe in probes]
    alone = np.concatenate([classifier.predict([text]) for text in encoded])
    if not classifier.padding_invariant:
        return alone, alone
    return alone, classifier.predict_all(encoded)
