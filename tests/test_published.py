"""Published evidence gets its published verdict when it is judged again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from proof.commands import main
from proof.evidence.store import EvidenceRejected
from proof.plans.plan_file import read_plan
from proof.verdict.schema import EXIT_CODES, read_verdict

PUBLISHED = sorted(path for path in Path("evidence/published").glob("*") if path.is_dir())


def test_some_evidence_is_published() -> None:
    assert PUBLISHED
    assert (
        sum(file.stat().st_size for file in Path("evidence/published").rglob("*") if file.is_file())
        < 40e6
    )


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_evidence_gets_the_same_verdict_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = read_verdict(folder / "verdict.json")
    assert main(["judge", str(folder)]) == EXIT_CODES[committed.verdict]
    assert f"verdict: {committed.verdict}." in capsys.readouterr().out


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_evidence_with_a_flipped_byte_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = bytearray((copy / "requests.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "requests.parquet").write_bytes(content)
    with pytest.raises(EvidenceRejected, match=r"requests\.parquet has changed"):
        main(["judge", str(copy)])


def test_the_published_index_lists_every_published_run_and_what_became_of_it() -> None:
    runs = json.loads(Path("evidence/published/index.json").read_text())
    assert len({entry["run"] for entry in runs}) == len(runs)
    by_name = {entry["run"]: entry for entry in runs}
    for folder in PUBLISHED:
        run = json.loads((folder / "run.json").read_text())
        entry = by_name[run["run"]]
        assert run.items() <= entry.items()
        assert entry["outcome"] == read_verdict(folder / "verdict.json").verdict
    for key in ("plan", "claim"):
        earlier = Counter[str]()
        for entry in sorted(runs, key=lambda entry: str(entry["run"])):
            earlier[entry[f"{key}_digest"]] += 1
            assert entry[f"number_for_this_{key}"] == earlier[entry[f"{key}_digest"]]


def test_readme_or_archive_show_each_verdict_and_the_digest_of_its_manifest() -> None:
    pages = [Path("README.md"), Path("docs/proof-archive.md")]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    for folder in PUBLISHED:
        verdict = read_verdict(folder / "verdict.json")
        digest = hashlib.sha256((folder / "MANIFEST.sha256").read_bytes()).hexdigest()
        [line] = [line for line in lines if re.search(rf"^\| \[{folder.name}\]\(", line)]
        assert f"**{verdict.verdict}**" in line
        assert digest[:16] in line


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_a_published_plan_can_be_run_again_as_it_is(folder: Path) -> None:
    plan = read_plan(folder / "plan.toml")
    assert plan.pilot is None or plan.pilot_path.is_file()
