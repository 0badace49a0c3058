"""The verdict on counted instructions, and work.json as a file that somebody may have changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from proof.evidence.store import EvidenceRejected
from proof.work.schema import (
    LIMITS,
    CountedArtifact,
    Measurement,
    Work,
    decide,
    describe,
    read_work,
    write_work,
)


def measurement(first: Sequence[float], second: Sequence[float]) -> Measurement:
    return Measurement(
        batch="8 tokens alone",
        texts=1,
        tokens=(8, 8),
        instructions=(list(first), list(second)),
    )


def counted(name: str, digest: str = "a" * 64) -> CountedArtifact:
    return CountedArtifact(
        name=name,
        digest=digest,
        variant="cpu-fp32",
        runtime="openvino",
        precision="f32",
        computes_in="f32",
        packs=True,
        encoder_digest="e" * 64,
        head_digest="d" * 64,
    )


def work_of(
    measurements: list[Measurement], margin: float = 0.001, digests: Sequence[str] = ("a", "b")
) -> Work:
    return Work(
        schema_version=1,
        verdict=decide(measurements, margin),
        margin=margin,
        method="valgrind",
        method_version="valgrind-3.19.0",
        threads=1,
        artifacts=(counted("bert", digests[0] * 64), counted("drbert", digests[1] * 64)),
        measurements=measurements,
        processor="a processor",
        system="Linux",
        python="3.11",
        packages={"openvino": "2026.3"},
    )


# Counted on the shipped example twins and the kept decoder by Valgrind 3.19.
TWINS = measurement((8_509_455, 8_511_573), (8_510_790, 8_512_910))
KEPT_DECODER = measurement((8_509_455, 8_511_573), (12_600_000, 12_601_000))


def test_equal_counts_are_the_same_work_and_a_decoder_is_not() -> None:
    assert decide([TWINS], 0.001) == "same"
    assert decide([TWINS, KEPT_DECODER], 0.001) == "different"


def test_less_work_is_different_too() -> None:
    assert decide([measurement((100, 100), (99, 99))], 0.001) == "different"


def test_the_margin_decides() -> None:
    almost = measurement((10_000, 10_000), (10_009, 10_009))
    assert decide([almost], 0.001) == "same"
    assert decide([almost], 0.0005) == "different"


def test_copies_that_differ_by_more_than_the_margin_tell_nothing() -> None:
    unsteady = measurement((10_000, 10_020), (10_000, 10_000))
    assert decide([unsteady], 0.001) == "inconclusive"
    assert decide([unsteady, KEPT_DECODER], 0.001) == "inconclusive"


def test_a_description_names_counts_method_and_limits() -> None:
    text = describe(work_of([TWINS]))
    assert "8 tokens alone" in text
    assert "+0.0157%" in text
    assert "counted by Valgrind (valgrind-3.19.0)" in text
    assert "tokenizer not included" in text
    assert LIMITS["valgrind"] in text
    assert "drbert executes as many instructions for a text as bert, within ±0.1 %" in text


def test_a_file_reads_back_the_same(tmp_path: Path) -> None:
    work = work_of([TWINS, KEPT_DECODER])
    write_work(tmp_path / "work.json", work)
    assert read_work(tmp_path / "work.json") == work


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"verdict": "different"}, "says different, its counts say same"),
        ({"schema_version": 2}, "schema_version 2 is unknown"),
        ({"schema_version": None}, "schema_version None is unknown"),
        ({"margin": 1.5}, "margin"),
        ({"measurements": []}, "measurements"),
        ({"further": 1}, "further"),
        ({"method": "a guess"}, "method"),
    ],
)
def test_a_file_that_contradicts_itself_is_rejected(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    path = tmp_path / "work.json"
    write_work(path, work_of([TWINS]))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EvidenceRejected, match=words) as raised:
        read_work(path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("8509455.0", "NaN"),
        ("8509455.0", "-1"),
        ("8509455.0", "0"),
    ],
)
def test_counts_that_cannot_be_are_rejected(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "work.json"
    write_work(path, work_of([TWINS]))
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(EvidenceRejected, match="instructions"):
        read_work(path)


def test_a_single_copy_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "work.json"
    write_work(path, work_of([TWINS]))
    values = json.loads(path.read_text())
    values["measurements"][0]["instructions"][1].pop()
    path.write_text(json.dumps(values))
    with pytest.raises(EvidenceRejected, match="at least 2 items"):
        read_work(path)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_a_file_that_is_no_counts_is_rejected_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "work.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(EvidenceRejected) as raised:
        read_work(path)
    assert len(str(raised.value).splitlines()) == 1
