"""The pages for a browser, in a real browser."""

from __future__ import annotations

import subprocess
import sys
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
REFUSED = "the server responded with a status of 422"
"""What the browser logs of a request that the service refused, as a test expects."""
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
                complaints.append(message.text)
                if message.type in ("error", "warning") and REFUSED not in message.text
                else None
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
    block = page.locator("#operations-classification-v1_classify")
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


@requirements.chromium
def test_a_table_is_read_by_the_column_of_its_texts(page: Page, tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text(
        'id;text;stars\n1;"good; very ""good""";5\n2;"bad\nfilm";1\n', encoding="utf-8-sig"
    )
    page.set_input_files("#file", tmp_path / "reviews.csv")
    rows = page.locator("#table tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(0).locator("td").first).to_have_text('good; very "good"')
    expect(page.get_by_label("Texts are in")).to_have_value("1")
    with page.expect_download() as downloading:
        page.get_by_role("button", name="Download as CSV").click()
    saved = downloading.value.path().read_text()
    assert saved.splitlines()[0] == (
        "\ufeffid,text,stars,bert label,bert score,drbert label,drbert score"
    )
    assert '1,"good; very ""good""",5,POSITIVE,0.' in saved
    page.get_by_label("Texts are in").select_option("0")
    expect(rows.nth(0).locator("td").first).to_have_text("1")
    page.get_by_label("the first row is a header").uncheck()
    expect(rows).to_have_count(3)
    page.locator("#options summary").click()
    page.locator("#models").get_by_label("drbert").uncheck()
    expect(page.locator("#table th")).to_have_count(2)
    page.locator("#models").get_by_label("bert", exact=True).uncheck()
    expect(page.locator("#message.error")).to_have_text("Choose a model in the options.")
    expect(rows).to_have_count(0)
    expect(page.get_by_role("button", name="Download as CSV")).to_be_disabled()


@requirements.chromium
def test_an_example_and_the_options_change_the_request(page: Page) -> None:
    page.locator("#examples button").first.click()
    cards = page.locator("#answers article")
    expect(cards).to_have_count(2)
    page.locator("#options summary").click()
    page.locator("#models").get_by_label("drbert").uncheck()
    expect(cards).to_have_count(1)
    page.get_by_label("Labels in an answer").fill("1")
    page.get_by_label("Labels in an answer").blur()
    expect(cards.locator("li.label")).to_have_count(1)
    page.get_by_role("button", name="all 2 labels").click()
    expect(cards.locator("li.label")).to_have_count(2)
    page.get_by_label("A text that is too long").select_option("none")
    page.get_by_label("A text to classify").fill("bad " * 30)
    expect(page.locator("#message.error")).to_contain_text("It has 32 tokens")
    expect(cards).to_have_count(0)


@requirements.chromium
def test_an_answer_is_announced_once_and_an_empty_text_says_what_to_do(page: Page) -> None:
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#message")).to_have_text("Type a text first.")
    page.get_by_label("A text to classify").fill("good film")
    expect(page.locator("#announcement")).to_have_text("bert: POSITIVE 73 %; drbert: GOOD 73 %")
    expect(page.locator("#answers")).not_to_have_attribute("aria-live", "polite")


@requirements.chromium
def test_a_request_is_copied_for_a_shell_and_for_python_and_as_a_link(page: Page) -> None:
    text = 'it\'s "good"\n$HOME'
    page.get_by_label("A text to classify").fill(text)
    for name, kind in (("curl", "curl"), ("Python", "Python")):
        page.evaluate("navigator.clipboard.writeText = sent => { window.copied = sent; }")
        page.get_by_role("button", name=f"Copy as {name}").click()
        expect(page.locator("#message")).to_contain_text(kind)
        copied = page.evaluate("window.copied")
        command = ["sh", "-c", copied] if name == "curl" else [sys.executable, "-c", copied]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "POSITIVE" in done.stdout
        assert "GOOD" in done.stdout
    page.get_by_role("button", name="Copy link").click()
    link = page.evaluate("window.copied")
    assert "?" not in link  # what is behind # is sent to nobody
    page.goto("about:blank")
    page.goto(link)
    expect(page.get_by_label("A text to classify")).to_have_value(text)
    expect(page.locator("#answers article")).to_have_count(2)


@requirements.chromium
def test_a_wrong_key_is_reported_and_never_takes_the_focus(
    artifact: Artifact, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("right-key-of-sixteen-characters\n")
    with (
        running(f"bert={artifact.directory}", DRBERT_API_KEYS_FILE=str(keys)) as (url, _),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(
            executable_path=requirements.CHROMIUM, args=list(BROWSER)
        )
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#state")).to_have_text("The service requires an API key.")
        page.keyboard.type("good film")
        expect(page.get_by_label("A text to classify")).to_be_focused()
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#message.error")).to_have_text(
            "The service does not accept this API key."
        )
        page.get_by_label("API key").fill("right-key-of-sixteen-characters")
        page.keyboard.press("Enter")
        expect(page.locator("#answers article")).to_have_count(1)
        browser.close()


@requirements.chromium
def test_every_label_that_counts_is_marked_and_many_labels_fold(tmp_path: Path) -> None:
    labels = [f"label {number}" for number in range(8)]
    folder = write_artifact(tmp_path / "tickets", labels=labels, task="multi_label").directory
    with running(str(folder)) as (url, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=requirements.CHROMIUM, args=list(BROWSER)
        )
        page = browser.new_page()
        page.goto(url)
        page.get_by_label("A text to classify").fill("good")
        card = page.locator("#answers article")
        expect(card.locator("li")).not_to_have_count(0)
        named = card.locator("h2 .answer").inner_text().split(", ")
        assert card.locator("li.label.best").count() == min(5, len(named))
        page.get_by_role("button", name="all 8 labels").click()
        expect(card.locator("li.label")).to_have_count(8)
        page.get_by_role("button", name="fewer labels").click()
        expect(card.locator("li.label")).to_have_count(5)
        browser.close()
