"""The generated pages of docs/ match the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import Settings
from tests.reference_pages import (
    COMMANDS,
    CONFIGURATION,
    LOGS,
    METRICS,
    PLANS,
    commands_page,
    configuration_page,
    field_descriptions,
    log_events,
    logs_page,
    metrics_page,
    plans_page,
)


def test_every_setting_has_a_description() -> None:
    assert field_descriptions(Settings).keys() == Settings.model_fields.keys()


@pytest.mark.parametrize(
    ("path", "page"),
    [
        (CONFIGURATION, configuration_page),
        (METRICS, metrics_page),
        (LOGS, logs_page),
        (COMMANDS, commands_page),
        (PLANS, plans_page),
    ],
    ids=str,
)
def test_a_generated_page_is_up_to_date(path: Path, page: object) -> None:
    assert callable(page)
    assert path.read_text(encoding="utf-8") == page(), "python -m tests.reference_pages writes it"


def test_the_page_of_the_log_has_its_events_and_their_fields() -> None:
    events = {event: (levels, fields) for event, levels, fields in log_events()}
    assert events["keys reloaded"] == (["info"], ["file", "keys"])
    assert "traceback" in events["a model could not be loaded"][1]
    assert len(events) > 35


def test_the_index_names_every_page() -> None:
    index = Path("docs/README.md").read_text(encoding="utf-8")
    pages = [path.name for path in Path("docs").glob("*.md") if path.name != "README.md"]
    assert [page for page in pages if f"]({page})" not in index] == []


def test_the_load_generator_brings_the_examples_sentences() -> None:
    bundled, example = Path("loadtests/sentences.txt"), Path("examples/texts/sentences.txt")
    assert bundled.read_bytes() == example.read_bytes()
