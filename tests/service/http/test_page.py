"""The pages for a browser, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from service.artifact import Artifact
from tests import requirements
from tests.factories import write_artifact
from tests.service.http.test_routes import client_of
from tests.service.test_server import running

BROWSER = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESKTOP, PHONE = (1200, 900), (390, 844)


@pytest.fixture(scope="module", params=["native", "infinity"])
def twins(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a service with two models of different label names, in both dialects of
    /classify.
    """
    folder = tmp_path_factory.mktemp("models")
    first = write_artifact(folder / "bert", labels=["NEGATIVE", "POSITIVE"])
    second = write_artifact(folder / "drbert", labels=["<b>BAD</b>", "GOOD"])
    with running(
        f"bert={first.directory}",
        f"drbert={second.directory}",
        DRBERT_CLASSIFY_DIALECT=request.param,
    ) as (url, _):
        yield url


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, twins: str) -> Iterator[Page]:
    """The open page; fails if the browser loads from another host or reports an error."""
    width, height = request.param
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=requirements.CHROMIUM, args=list(BROWSER)
        )
        page = browser.new_page(viewport={"width": width, "height": height})
        elsewhere: list[str] = []
        page.on(
            "request",
            lambda sent: (
                None if sent.url.startswith((twins, "data:")) else elsewhere.append(sent.url)
            ),
        )
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.goto(twins)
        yield page
        browser.close()
        assert elsewhere == []
        assert complaints == []


@requirements.chromium
def test_the_api_page_works_under_a_policy_without_inline_scripts(page: Page, twins: str) -> None:
    """The browser would report a violation of the policy, and a file with another digest."""
    answer = page.goto(f"{twins}/docs")
    assert answer is not None
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    block = page.locator("#operations-default-v1_classify")
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    block.locator("textarea").fill('{"input": "good film"}')
    block.get_by_role("button", name="Execute").click()
    expect(block.locator(".live-responses-table")).to_contain_text("POSITIVE")


@requirements.chromium
def test_a_typed_text_gets_the_scores_of_both_models(page: Page) -> None:
    page.get_by_label("A text to classify").press_sequentially("good film")
    cards = page.locator("#answers article")
    expect(cards).to_have_count(2)
    expect(cards.nth(0)).to_contain_text("bert")
    expect(cards.nth(0).locator(".label.best")).to_have_text("POSITIVE73.11 %")
    expect(cards.nth(1).locator(".label.best")).to_have_text("GOOD73.11 %")
    expect(cards.nth(1)).to_contain_text("<b>BAD</b>")  # a label is text, whatever it holds
    expect(cards.nth(0)).to_contain_text("4 tokens")
    expect(cards.nth(0).locator(".legend")).to_contain_text("inference")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "the page is wider than the screen"
    )


@requirements.chromium
def test_a_truncated_text_is_marked_and_the_keyboard_is_enough(page: Page) -> None:
    page.keyboard.type("bad " * 30)  # the text field has the focus
    page.keyboard.press("Control+Enter")
    expect(page.locator("#answers article").first).to_contain_text(
        "truncated to the model's length"
    )
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Classify")).to_be_focused()


@requirements.chromium
def test_each_line_of_a_file_is_classified(page: Page, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("good\n\nbad bad\nfilm\n" * 20)
    page.set_input_files("#file", tmp_path / "texts.txt")
    rows = page.locator("#table tbody tr")
    expect(rows).to_have_count(60)
    expect(rows.nth(1)).to_have_text("bad badNEGATIVE 0.8808<b>BAD</b> 0.8808")
    expect(page.locator("#message")).to_have_text("60 of 60 texts")


@requirements.chromium
def test_the_last_minutes_latency_is_shown_for_each_model(page: Page) -> None:
    page.get_by_label("A text to classify").fill("good")
    expect(page.locator("#answers article")).to_have_count(2)
    rows = page.locator("#live tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(0).locator("td").nth(2)).to_contain_text("ms", timeout=15_000)


async def test_a_client_that_is_not_a_browser_gets_json_at_the_root(artifact: Artifact) -> None:
    async with client_of(artifact) as (client, _):
        answer: httpx.Response = await client.get("/")
        page = await client.get("/", headers={"Accept": "text/html,*/*"})
    assert answer.json()["classify"] == "POST /classify"
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
