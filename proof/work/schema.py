"""
work.json: what was counted, and the verdict that follows from it alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proof.evidence.store import EvidenceRejected

SCHEMA_VERSION: Literal[1] = 1
DEFAULT_MARGIN = 0.001
"""Two exports of one graph differ by a few thousandths of a percent; one layer is many percent."""
WorkOutcome = Literal["same", "different", "inconclusive"]
EXIT_CODES: dict[WorkOutcome, int] = {"same": 0, "different": 1, "inconclusive": 2}
LIMITS: dict[str, str] = {
    "counters": "Not counted: the kernel, waiting, cache misses, a GPU.",
    "valgrind": (
        "Not counted: the kernel, waiting, cache misses, a GPU. Valgrind emulates a processor"
        " without AVX-512, bf16 and VNNI, so code for those was not run."
    ),
}
"""What the counts cannot show, by method."""
Instructions = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CountedArtifact(_Part):
    """One artifact, as the production classifier loaded it."""

    name: str
    digest: str
    """SHA-256 of its manifest."""
    variant: str
    runtime: str
    precision: str
    computes_in: str
    """Precision of what is not quantized."""
    packs: bool
    """Whether several texts share a row of a batch."""
    encoder_digest: str
    head_digest: str


class Measurement(_Part):
    """Instructions for one text of one kind of batch; tuples are (first, second) artifact."""

    batch: str
    """Name of the batch, such as "8 tokens alone"."""
    texts: Annotated[int, Field(ge=1)]
    """Texts in the batch."""
    tokens: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """Tokens of one text, special tokens included."""
    instructions: tuple[
        Annotated[list[Instructions], Field(min_length=2)],
        Annotated[list[Instructions], Field(min_length=2)],
    ]
    """Instructions for one text in each copy of each artifact."""

    @property
    def ratio(self) -> float:
        """Mean of the second artifact's copies by that of the first's."""
        first, second = self.means
        return second / first

    @property
    def means(self) -> tuple[float, float]:
        """Instructions for one text, mean of the copies."""
        first, second = (sum(copies) / len(copies) for copies in self.instructions)
        return first, second

    @property
    def spread(self) -> float:
        """Largest relative difference between two copies of one artifact (A/A)."""
        return max(max(copies) / min(copies) - 1 for copies in self.instructions)


class Work(_Part):
    """work.json."""

    schema_version: Literal[1]
    verdict: WorkOutcome
    margin: Annotated[float, Field(gt=0, lt=1)]
    """Largest relative difference that counts as the same work."""
    method: Literal["counters", "valgrind"]
    method_version: str
    threads: Literal[1]
    artifacts: tuple[CountedArtifact, CountedArtifact]
    """The first artifact and the second one."""
    measurements: Annotated[list[Measurement], Field(min_length=1)]
    processor: str
    system: str
    python: str
    packages: dict[str, str]
    """Versions of the engines and of what prepares their inputs."""


def decide(measurements: list[Measurement], margin: float) -> WorkOutcome:
    """Return the verdict: nothing is said where two copies of one artifact differ too much."""
    if any(each.spread > margin for each in measurements):
        return "inconclusive"
    if any(abs(each.ratio - 1) > margin for each in measurements):
        return "different"
    return "same"


def read_work(path: Path) -> Work:
    """Return work.json; EvidenceRejected if it cannot be read or contradicts itself."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise EvidenceRejected(f"{path} cannot be read: it is nested too deeply.") from None
    except (OSError, ValueError) as error:
        raise EvidenceRejected(f"{path} cannot be read: {error}.") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise EvidenceRejected(
            f"{path}: schema_version {str(version)[:40]} is unknown; this version reads"
            f" {SCHEMA_VERSION}."
        )
    try:
        work = Work.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise EvidenceRejected(f"{path}: {place}: {first['msg']}.") from None
    verdict = decide(work.measurements, work.margin)
    if work.verdict != verdict:
        raise EvidenceRejected(f"{path} says {work.verdict}, its counts say {verdict}.")
    return work


def write_work(path: Path, work: Work) -> None:
    """Write work.json."""
    path.write_text(work.model_dump_json(indent=2) + "\n", encoding="utf-8")


def sentence(work: Work) -> str:
    """Return the verdict in one sentence."""
    first, second = (artifact.name for artifact in work.artifacts)
    widest = max(work.measurements, key=lambda each: abs(each.ratio - 1))
    spread = max(each.spread for each in work.measurements)
    margin = f"±{100 * work.margin:.3g} %"
    if work.verdict == "inconclusive":
        return (
            f"Cannot tell: two copies of one artifact differ by {spread:.4%}, which is more than"
            f" the margin of {margin}."
        )
    size = f"{widest.ratio - 1:+.4%} at {widest.batch}"
    if work.verdict == "same":
        return (
            f"{second} executes as many instructions for a text as {first}, within {margin}"
            f" (furthest {size}; two copies of one artifact differ by at most {spread:.4%})."
        )
    return (
        f"{second} does not execute as many instructions for a text as {first}: {size}, and the"
        f" margin is {margin}."
    )


def describe(work: Work) -> str:
    """Return counts, verdict and limits as lines for a terminal."""
    first, second = work.artifacts
    names = [artifact.name for artifact in work.artifacts]
    widths = [max(14, len(name)) for name in names]
    lines = [
        f"instructions for one text by {first.variant} ({first.runtime}, computes in"
        f" {first.computes_in}, {'packed' if second.packs else 'unpacked'} rows, 1 thread,"
        f" tokenizer not included), counted by {how_counted(work)}",
        f"  {'batch':<24}{names[0]:>{widths[0]}}  {names[1]:>{widths[1]}}  difference   two copies",
    ]
    for each in work.measurements:
        a, b = each.means
        lines.append(
            f"  {each.batch:<24}{a:>{widths[0]},.0f}  {b:>{widths[1]},.0f}"
            f"  {each.ratio - 1:>+10.4%}   {each.spread:>10.4%}"
        )
    lines += [f"  {LIMITS[work.method]}", f"work: {work.verdict}. {sentence(work)}"]
    return "\n".join(lines)


def how_counted(work: Work) -> str:
    """Return the method in words."""
    if work.method == "counters":
        return f"hardware counters ({work.method_version})"
    return f"Valgrind ({work.method_version})"
