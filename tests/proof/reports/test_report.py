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

from command import BadInput
from proof.commands import main
from proof.evidence.audit import read_sealed_plan
from proof.evidence.store import Requests, read_starts, write_manifest
from proof.reports import markdown, report
from proof.reports.distributions import (
    Distribution,
    LevelProfile,
    estimate_shift_function,
    profile_levels,
)
from proof.reports.drawing import Scale, draw_chart, draw_label, ratio_ticks, time_ticks
from proof.reports.formatting import escape_text, format_difference
from proof.reports.page import render, renderer_version
from proof.reports.report_environment import build_comparisons, build_environment
from proof.reports.reported_run import OUTCOME_STYLES
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


def visible_text(page: str) -> str:
    """Return the page without tags, as a reader sees it."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def open_in_chromium(path: Path, *flags: str) -> str:
    """Return the document that Chromium makes of a page."""
    command = [
        requirements.CHROMIUM,
        *HEADLESS,
        *flags,
        f"--user-data-dir={path.parent / 'profile'}",
        "--dump-dom",
        path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def profile_of(evidence: Path, level: str) -> LevelProfile:
    plan, starts = read_sealed_plan(evidence), read_starts(evidence)
    return profile_levels(Requests(evidence), plan, starts)[level]


def test_a_report_begins_with_the_verdict_and_its_sentence(evidence: Path, page: str) -> None:
    verdict = read_verdict(evidence / "verdict.json")
    text = visible_text(page)
    begin = text.index(OUTCOME_STYLES[verdict.verdict].title)
    assert begin < text.index(verdict.sentence) < text.index("unloaded") < text.index("Differences")


def test_a_report_shows_everything_the_verdict_rests_on(evidence: Path, page: str) -> None:
    verdict = read_verdict(evidence / "verdict.json")
    text = visible_text(page)
    for level in verdict.levels.values():
        for item in level.statistics:
            assert format_difference(item.ratio) in text
            assert f"{item.sign_flip_p:.3f}" in text
        for gate in level.gates:
            assert gate.name in text
    assert "with status 503" in text
    assert verdict.plan.digest in text
    assert f"run {verdict.run.number_for_this_plan} of this plan" in text
    assert "drbert-prove judge ." in text
    assert "(gain 1.50)" in text


def test_a_report_has_a_chart_for_every_question(page: str) -> None:
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


def test_a_report_makes_no_request(evidence: Path, tmp_path: Path) -> None:
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
    assert visible_text(page).count(address) == 2


def test_a_report_is_small_and_well_formed(page: str) -> None:
    assert len(page) < 1_000_000
    for element in ElementTree.fromstring(page).iter():
        for name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "width", "height", "points"):
            numbers = re.split(r"[ ,]", element.get(name, "0").replace("%", ""))
            assert all(math.isfinite(float(number)) for number in numbers), (
                element.tag,
                element.attrib,
            )


@requirements.chromium
def test_chromium_shows_the_verdict_and_the_charts(
    evidence: Path, page: str, tmp_path: Path
) -> None:
    (tmp_path / "report.html").write_text(page)
    document = open_in_chromium(tmp_path / "report.html")
    verdict = read_verdict(evidence / "verdict.json")
    assert re.search(rf"<h1>.*{OUTCOME_STYLES[verdict.verdict].title}</h1>", document)
    assert len(re.findall(r"<svg[^>]* role=\"img\"", document)) == page.count('role="img"')
    assert document.count("<polyline ") > 0


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of a run on a real machine, with long names that have no spaces."""
    folder = tmp_path_factory.mktemp("real") / "run"
    shutil.copytree("evidence/published/mini-fp32", folder)
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
    document = open_in_chromium(tmp_path / "frame.html")
    match = re.search(r"<title>(\d+) (\d+) (\d+)</title>", document)
    assert match is not None
    page_width, labels, cut_labels = map(int, match.groups())
    assert page_width <= width
    assert labels > 50
    assert cut_labels == 0, "text is cut at the edge"


@pytest.mark.parametrize("restarts", [1, 2, 3])
def test_a_run_of_too_few_restarts_is_reported(tmp_path: Path, restarts: int) -> None:
    folder = write_evidence(tmp_path / "run", restarts=restarts, planned=8, levels=LEVELS)
    text = visible_text((folder / "report.html").read_text())
    assert "Inconclusive" in text
    assert f"{restarts} restarts are too few for an interval." in text


def test_a_run_whose_restarts_were_all_dropped_is_reported(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", restarts=0, planned=8, dropped=(0,))
    text = visible_text((folder / "report.html").read_text())
    assert "1 of 1 do not count" in text
    assert "No requests count." in text


def test_deciles_agree_with_the_verdict_where_both_know_the_median(evidence: Path) -> None:
    plan, verdict = read_sealed_plan(evidence), judge_run(evidence)
    for level in ("unloaded", "switchback-50"):
        median = estimate_shift_function(plan, profile_of(evidence, level), "end_to_end")[4]
        claimed = next(
            item
            for item in verdict.levels[level].statistics
            if (item.metric, item.statistic) == ("end_to_end", "p50")
        )
        assert median.ratio == pytest.approx(claimed.ratio)
        assert np.exp(median.interval(0.90)) == pytest.approx(claimed.interval)


def test_charts_leave_out_dropped_restarts_warm_up_and_delayed_rows(evidence: Path) -> None:
    profile = profile_of(evidence, "unloaded")
    # Eight restarts of 64 blocks of four requests and 16 closing blocks of five; a quarter of the
    # blocks is for the control.
    assert profile.requests == 8 * (64 * 4 + 16 * 5)
    assert len(profile.distributions["reference", "inference"]) == 8 * 48 * 2
    assert profile.phases["delayed"].requests == 8 * 16
    assert profile.phases["control"].requests == 8 * 16
    assert sum(profile.phases["reference"].mean_ms().values()) == pytest.approx(
        profile.phases["reference"].mean_ms()["inference"] + 0.5, abs=0.01
    )


def test_a_distribution_knows_its_quantiles_to_a_thousandth() -> None:
    us = np.random.default_rng(0).lognormal(8, 0.5, 50_000)
    distribution = Distribution()
    for part in np.array_split(us, 7):
        distribution.add(part)
    assert len(distribution) == len(us)
    assert distribution.quantiles([0.01, 0.5, 0.99]) == pytest.approx(
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


def test_text_in_a_chart_is_escaped() -> None:
    label = draw_label(0, 0, '<a href="x">')
    chart = draw_chart(10, "a & b", "c < d", [label])
    assert ">&lt;a href=&#34;x&#34;&gt;</text>" in chart
    assert 'aria-label="a &amp; b"><title>a &amp; b</title><desc>c &lt; d</desc>' in chart
    assert escape_text(label) is label


def test_an_address_in_a_report_cannot_be_mistaken_for_a_request() -> None:
    assert "//" not in escape_text("http" + "://host")


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.02, "+2.00%"), (0.98, "\N{MINUS SIGN}2.00%"), (1.00001, "0.00%"), (0.99999, "0.00%")],
)
def test_a_difference_has_a_sign_unless_it_rounds_to_zero(ratio: float, text: str) -> None:
    assert format_difference(ratio) == text


@pytest.mark.parametrize("reach", [0.003, 0.02, 0.05, 0.4, 1.5])
def test_an_axis_of_ratios_has_no_difference_in_it(reach: float) -> None:
    ticks = ratio_ticks(-reach, reach)
    assert (0.0, "0%") in ticks
    assert 3 <= len(ticks) <= 5
    assert len({name for _, name in ticks}) == len(ticks)


def test_a_value_beyond_a_scale_is_drawn_at_its_end() -> None:
    scale = Scale(-1, 1, 10, 90)
    assert (scale(0), scale(5), scale(-5)) == (50, 90, 10)
    assert not scale.contains(5)


def test_a_pull_request_gets_a_table_for_each_level(
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
    assert "Control bert-delayed: expected +6.00%, detected" in printed
    assert (
        f"run 1 of this plan, runs of its claim not counted: small `{verdict.plan.digest}`"
        in printed
    )


def test_a_report_says_what_was_claimed_and_what_was_not(page: str) -> None:
    text = visible_text(page)
    assert "claimed: p50 and mean of end to end and p50, mean and p99 of inference" in text
    assert "not claimed: p95 and p99 of end to end" in text
    assert "variant, precision, engine and packing are unknown" in text
    assert "texts of 5 to 5 tokens" in text


def test_a_report_describes_single_texts_next_to_the_same_model(evidence: Path, page: str) -> None:
    texts = judge_run(evidence).levels["unloaded"].texts
    assert texts is not None
    text = visible_text(page)
    assert "unloaded: medians of 2 texts, which decide nothing" in text
    assert f"candidate over reference {format_difference(texts.candidate.ratio)}" in text


def test_a_page_is_the_same_wherever_its_folder_lies(evidence: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(evidence, tmp_path / "elsewhere")
    assert report.check_page(copy, judge_run(copy)) == ""


def test_a_page_of_another_version_is_not_compared_and_the_judge_says_so(
    evidence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(evidence, tmp_path / "run")
    path = copy / "report.html"
    path.write_text(path.read_text().replace(renderer_version(), "0" * 16, 1))
    write_manifest(copy)
    for command in (["judge", str(copy)], ["report", str(copy), "--out", str(tmp_path / "x")]):
        assert main(command) == 0
        assert (
            "was made by another version of the report, so it was not compared"
            in capsys.readouterr().out
        )


def test_a_pull_request_shows_the_gates_that_failed(evidence: Path) -> None:
    values = read_verdict(evidence / "verdict.json").model_dump()
    unloaded = values["levels"]["unloaded"]
    for gate in unloaded["gates"]:
        gate["passed"] = gate["name"] != "few restarts dropped"
    values["levels"] = {"unloaded": unloaded | {"statistics": []}}
    printed = markdown.render(Verdict.model_validate(values))
    assert "Failed: too many restarts were dropped (1 of 9 (at most 20%))" in printed
    assert "8 restarts are too few" in printed


def test_a_report_is_written_again_outside_the_sealed_folder(
    evidence: Path, tmp_path: Path, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["report", str(evidence), "--out", str(tmp_path / "again.html")]) == 0
    # A page in the sealed folder would be a change of it.
    with monkeypatch.context() as patched:
        patched.chdir(evidence)
        with pytest.raises(BadInput, match="in the sealed folder"):
            main(["report", "."])
    assert main(["judge", str(evidence)]) == 0
    assert (tmp_path / "again.html").read_text() == page


def test_a_report_compares_artifacts_whatever_identity_json_holds() -> None:
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
    identity = {"drbert": twin, "electra": other, "decoder": other | {"same_encoder": False}}
    comparisons = build_comparisons(identity, controls=["decoder"])
    text = " ".join(
        visible_text(render("comparison.html.j2", artifact=artifact)) for artifact in comparisons
    )
    assert "drbert: same work The same encoder graph" in text
    assert "cpu encoder same aaaaaaaaaaaaaaaa aaaaaaaaaaaaaaaa 256 and 256" in text
    assert "cpu subnormal weights differs 0 1,200" in text
    assert (
        "electra: different work The same encoder as the reference, but: cpu head: 4 and 5 nodes"
        in text
    )
    assert "decoder: different work, as a control should Not the reference's graph:" in text


def test_a_report_shows_the_machine_whatever_environment_json_holds() -> None:
    environment = build_environment(
        {
            "gpu": {"name": "H100", "clocks_mhz": [1980, 2619]},
            "commit": None,
            "server": {"threads": 1, "models": {"bert": {"digest": "b" * 64}}},
        }
    )
    text = visible_text(render("environment.html.j2", environment=environment))
    assert "gpu name H100, clocks_mhz 1,980, 2,619" in text
    assert "commit null" in text
    assert "server threads 1" in text
    assert f"bert {'b' * 16} " in text
    nothing = render("environment.html.j2", environment=build_environment({}))
    assert "Nothing was recorded." in nothing
