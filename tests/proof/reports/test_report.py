from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from proof.commands import main
from proof.evidence.audit import read_sealed_plan
from proof.evidence.store import Requests, read_starts
from proof.reports import report
from proof.reports.distributions import Distribution, Portrait, portraits, shift
from proof.reports.drawing import Scale, percent, ratio_ticks, time_ticks
from proof.reports.markdown import markdown
from proof.reports.report_environment import environment, same_work
from proof.verdict.judge import judge_run
from proof.verdict.schema import Verdict, read_verdict
from tests import requirements
from tests.proof.factories import write_evidence

LEVELS = ("unloaded", "mixed-50", "switchback-50", "capacity")
HEADLESS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every kind of level, one of its restarts dropped."""
    return write_evidence(
        tmp_path_factory.mktemp("evidence") / "run", levels=LEVELS, dropped=(2,), noise=0.02
    )


@pytest.fixture(scope="module")
def page(evidence: Path) -> str:
    return (evidence / "report.html").read_text()


def words_of(page: str) -> str:
    """What a reader sees, without tags."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def opened(path: Path, *flags: str) -> str:
    """The page as Chromium understands it."""
    command = [
        requirements.CHROMIUM,
        *HEADLESS,
        *flags,
        f"--user-data-dir={path.parent / 'profile'}",
        "--dump-dom",
        path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def shown(evidence: Path, level: str) -> Portrait:
    return portraits(Requests(evidence), read_sealed_plan(evidence), read_starts(evidence))[level]


def test_a_report_begins_with_the_verdict_and_its_sentence(evidence: Path, page: str) -> None:
    verdict = read_verdict(evidence / "verdict.json")
    said = words_of(page)
    begin = said.index(report.TITLES[verdict.verdict][0])
    assert begin < said.index(verdict.sentence) < said.index("unloaded") < said.index("Differences")


def test_a_report_tells_everything_the_verdict_rests_on(evidence: Path, page: str) -> None:
    verdict = read_verdict(evidence / "verdict.json")
    said = words_of(page)
    for level in verdict.levels.values():
        for item in level.statistics:
            assert percent(item.ratio) in said
            assert f"{item.sign_flip_p:.3f}" in said
        for gate in level.gates:
            assert gate.name in said
    assert "with status 503" in said
    assert verdict.plan.digest in said
    assert f"number {verdict.run.number_for_this_plan} of this plan" in said
    assert "python -m proof judge run" in said
    assert "(gain 1.50)" in said


def test_a_report_has_a_picture_for_every_question(page: str) -> None:
    titles = re.findall(r'role="img" aria-label="([^"]+)"', page)
    for level in LEVELS:
        assert f"Differences at {level}" in titles
        assert f"Ratio of every restart at {level}" in titles
        assert f"Where the time goes at {level}" in titles
    for level, metric in (
        ("unloaded", "end to end"),
        ("unloaded", "inference"),
        ("mixed-50", "inference"),
        ("switchback-50", "end to end"),
    ):
        assert f"Shift function of {metric} at {level}" in titles
        assert f"Distribution of {metric} at {level}" in titles
    assert {title for title in titles if "along a restart" in title} == {
        f"{ratio} along a restart at {level}"
        for level in ("unloaded", "mixed-50")
        for ratio in ("bert-again over bert", "candidate over reference")
    }
    assert page.count("<desc>") == len(titles)


def test_a_report_asks_nothing_of_any_network(evidence: Path, tmp_path: Path) -> None:
    address = "http" + "://127.0.0.1:8008/classify"
    copy = tmp_path / "run"
    copy.mkdir()
    for path in evidence.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "environment.json").write_text(
        json.dumps(
            {
                "system": "<script>",
                "server": {
                    "address": address,
                    "models": {"bert": {"digest": "ab", "runtime": address}},
                },
            }
        )
    )
    page = report.write(
        copy, read_verdict(copy / "verdict.json"), tmp_path / "again.html"
    ).read_text()
    for reference in (
        "http://",
        "https://",
        "//",
        "src=",
        "url(",
        "@import",
        "<script",
        "<link",
        "<iframe",
        "<object",
    ):
        assert reference not in page, reference
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert {target[1:] for target in re.findall(r'href="([^"]*)"', page)} <= set(
        re.findall(r'id="([^"]*)"', page)
    )
    assert words_of(page).count(address) == 2


def test_a_report_is_small_and_its_markup_is_whole(page: str) -> None:
    assert len(page) < 1_000_000
    for element in ElementTree.fromstring(page).iter():
        for name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "width", "height", "points"):
            numbers = re.split(r"[ ,]", element.get(name, "0").replace("%", ""))
            assert all(math.isfinite(float(number)) for number in numbers), (
                element.tag,
                element.attrib,
            )


@requirements.chromium
def test_chromium_shows_the_verdict_and_the_pictures(
    evidence: Path, page: str, tmp_path: Path
) -> None:
    (tmp_path / "report.html").write_text(page)
    seen = opened(tmp_path / "report.html")
    verdict = read_verdict(evidence / "verdict.json")
    assert re.search(rf"<h1>.*{report.TITLES[verdict.verdict][0]}</h1>", seen)
    assert len(re.findall(r"<svg[^>]* role=\"img\"", seen)) == page.count('role="img"')
    assert seen.count("<polyline ") > 0


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run on a real machine, whose processor, system and packages have names that do
    not break.
    """
    folder = tmp_path_factory.mktemp("real") / "run"
    shutil.copytree("evidence/published/twins-base-2", folder)
    report.write(folder, read_verdict(folder / "verdict.json"))
    return (folder / "report.html").read_text()


@requirements.chromium
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("which", ["page", "real"])
def test_a_page_is_as_wide_as_its_window(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, width: int
) -> None:
    page = request.getfixturevalue(which)
    frame = (
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(page)}" '
        "onload=\"const d=this.contentDocument; document.title=d.documentElement.scrollWidth+'"
        " '+d.querySelectorAll('svg text').length+' '"
        "+[...d.querySelectorAll('svg[role=img]"
        " text')].filter(t=>t.getBoundingClientRect().right>d.documentElement.clientWidth+1"
        '||t.getBoundingClientRect().left<-1).length"></iframe>'
    )
    (tmp_path / "frame.html").write_text(f'<!doctype html><meta charset="utf-8">{frame}')
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", opened(tmp_path / "frame.html"))
    assert found is not None
    assert int(found[1]) <= width
    assert int(found[2]) > 50
    assert int(found[3]) == 0, "text is cut at the edge"


@pytest.mark.parametrize("restarts", [1, 2, 3])
def test_a_run_of_too_few_restarts_is_reported_all_the_same(tmp_path: Path, restarts: int) -> None:
    folder = write_evidence(tmp_path / "run", restarts=restarts, planned=8, levels=LEVELS)
    said = words_of((folder / "report.html").read_text())
    assert "Inconclusive" in said
    assert f"{restarts} restarts are too few for an interval." in said


def test_a_run_whose_restarts_were_all_dropped_is_reported_all_the_same(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", restarts=0, planned=8, dropped=(0,))
    said = words_of((folder / "report.html").read_text())
    assert "1 of 1 do not count" in said
    assert "No requests count." in said


def test_deciles_agree_with_the_verdict_where_both_know_the_median(evidence: Path) -> None:
    plan, verdict = read_sealed_plan(evidence), judge_run(evidence)
    for level in ("unloaded", "switchback-50"):
        median = shift(plan, shown(evidence, level), "end_to_end")[4]
        claimed = next(
            item
            for item in verdict.levels[level].statistics
            if (item.metric, item.statistic) == ("end_to_end", "p50")
        )
        assert median.ratio == pytest.approx(claimed.ratio)
        assert np.exp(median.interval(0.90)) == pytest.approx(claimed.interval)


def test_pictures_leave_out_dropped_restarts_warm_up_and_slowed_down_rows(evidence: Path) -> None:
    portrait = shown(evidence, "unloaded")
    # 64 tuples of four, a closing block of 16 tuples of five, eight restarts; a quarter of the
    # tuples is for the control.
    assert portrait.requests == 8 * (64 * 4 + 16 * 5)
    assert len(portrait.seen["reference", "inference"]) == 8 * 48 * 2
    assert portrait.phases["delayed"].requests == 8 * 16
    assert portrait.phases["control"].requests == 8 * 16
    assert sum(portrait.phases["reference"].mean_ms().values()) == pytest.approx(
        portrait.phases["reference"].mean_ms()["inference"] + 0.5, abs=0.01
    )


def test_a_distribution_knows_its_quantiles_to_a_thousandth() -> None:
    us = np.random.default_rng(0).lognormal(8, 0.5, 50_000)
    seen = Distribution()
    for part in np.array_split(us, 7):
        seen.add(part)
    assert len(seen) == len(us)
    assert seen.quantiles([0.01, 0.5, 0.99]) == pytest.approx(
        np.quantile(us, [0.01, 0.5, 0.99]), rel=2e-3
    )


@pytest.mark.parametrize("low", [2.0, 180.0, 950.0, 4_321.0, 90_000.0])
@pytest.mark.parametrize("times", [1.01, 1.3, 3.0, 20.0, 900.0])
def test_an_axis_has_a_few_round_times(low: float, times: float) -> None:
    high = low * times
    ticks = time_ticks(low, high)
    assert 2 <= len(ticks) <= 5
    assert all(np.log(low) <= value <= np.log(high) for value, _ in ticks)
    assert len({name for _, name in ticks}) == len(ticks)


@pytest.mark.parametrize("reach", [0.003, 0.02, 0.05, 0.4, 1.5])
def test_an_axis_of_ratios_has_no_difference_in_it(reach: float) -> None:
    ticks = ratio_ticks(-reach, reach)
    assert (0.0, "0%") in ticks
    assert 3 <= len(ticks) <= 5
    assert len({name for _, name in ticks}) == len(ticks)


def test_what_lies_beyond_a_scale_is_drawn_at_its_end() -> None:
    scale = Scale(-1, 1, 10, 90)
    assert (scale(0), scale(5), scale(-5)) == (50, 90, 10)
    assert not scale.holds(5)


def test_a_pull_request_gets_a_table_a_level(
    evidence: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(evidence), "--markdown"]) == 0
    printed = capsys.readouterr().out
    verdict = read_verdict(evidence / "verdict.json")
    assert printed.startswith(f"**{verdict.verdict}** {verdict.sentence}")
    assert printed.count("| statistic | difference | 90 % interval | margin | reading |") == len(
        LEVELS
    )
    assert sum(line.startswith("| end to end p50 |") for line in printed.splitlines()) == 2
    assert "Control bert-delayed: made +6.00%, told apart" in printed
    assert f"number 1 of plan small `{verdict.plan.digest}`" in printed


def test_a_pull_request_hears_of_gates_that_failed(evidence: Path) -> None:
    found = read_verdict(evidence / "verdict.json").model_dump()
    for gate in found["levels"]["unloaded"]["gates"]:
        gate["passed"] = gate["name"] != "few restarts dropped"
    found["levels"] = {"unloaded": found["levels"]["unloaded"] | {"statistics": []}}
    printed = markdown(Verdict.model_validate(found))
    assert "Gates that failed: few restarts dropped: 1 of 9 (at most 20%)" in printed
    assert "8 restarts are too few" in printed


def test_a_report_is_written_again_beside_the_sealed_folder(
    evidence: Path, tmp_path: Path, page: str
) -> None:
    assert main(["report", str(evidence), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == page


def test_what_artifacts_compute_and_where_it_ran_is_told_whatever_it_holds() -> None:
    twin = {
        "same": True,
        "variants": {
            "cpu": {
                "encoder": {"same": True, "digests": ["a" * 64] * 2, "nodes": [256, 256]},
                "subnormal_weights": [0, 1200],
            }
        },
        "parameters": [5, 5],
    }
    other = {
        "same": False,
        "same_encoder": True,
        "differences": [{"what": "cpu head", "detail": "4 and 5 nodes"}],
    }
    said = words_of(
        same_work(
            {"drbert": twin, "electra": other, "kept": other | {"same_encoder": False}},
            controls=["kept"],
        )
    )
    assert "cpu encoder same aaaaaaaaaaaaaaaa aaaaaaaaaaaaaaaa 256 and 256" in said
    assert "cpu subnormal weights differs 0 1,200" in said
    assert (
        "electra: other work The same encoder as the reference, but: cpu head: 4 and 5 nodes"
        in said
    )
    assert "kept: other work, as a control should" in said
    here = words_of(
        environment(
            {
                "gpu": {"name": "H100", "clocks_mhz": [1980, 2619]},
                "commit": None,
                "server": {"threads": 1, "models": {"bert": {"digest": "b" * 64}}},
            }
        )
    )
    assert "gpu name H100, clocks_mhz 1,980, 2,619" in here
    assert "server threads 1" in here
    assert f"bert {'b' * 16} " in here
