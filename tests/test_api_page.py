"""docs/api.md is the whole API: every path, field, error code and limit of the code is on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from service import errors
from service.artifact import Artifact
from service.schemas import Classification, ClassifyAnswer, ClassifyRequest, Window
from service.settings import Settings
from tests.service.http.test_routes import client_of

PAGE = Path("docs/api.md").read_text(encoding="utf-8")
METHODS = ("get", "post", "put", "patch", "delete")


def rows(heading: str) -> list[list[str]]:
    """Return the cells of every table row below a heading, up to the next one."""
    section = PAGE.partition(f"# {heading}\n")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def names(heading: str) -> set[str]:
    """Return every word in code style in the first column below a heading."""
    return {name for row in rows(heading) for name in re.findall(r"`([^`]+)`", row[0])}


def service_errors() -> list[type[errors.ServiceError]]:
    """Return every error class of the service."""
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.ServiceError)
    ]
    assert len(classes) > 10
    return classes


@pytest.mark.parametrize("classify_dialect", ["native", "infinity", "ort-server"])
async def test_every_path_of_the_openapi_document_is_on_the_page(
    artifact: Artifact, classify_dialect: str
) -> None:
    async with client_of(artifact, classify_dialect=classify_dialect) as (client, _):
        document: dict[str, Any] = (await client.get("/openapi.json")).json()
    endpoints = names("Endpoints")
    described = {
        f"{method.upper()} {path}"
        for path, operations in document["paths"].items()
        for method in operations
        if method in METHODS
    }
    assert described <= endpoints, described - endpoints


@pytest.mark.parametrize("error", service_errors(), ids=lambda error: error.__name__)
def test_every_error_code_is_on_the_page_with_its_status_and_type(
    error: type[errors.ServiceError],
) -> None:
    shown = {row[0]: row[1:3] for row in rows("Errors") if len(row) == 5}
    assert shown[f"`{error.code}`"] == [str(int(error.status)), f"`{error.type}`"]


def test_every_field_of_a_request_is_on_the_page() -> None:
    assert ClassifyRequest.model_fields.keys() <= names("Request")
    assert {f"window.{name}" for name in Window.model_fields} <= names("Long texts")


def test_every_field_of_an_answer_is_on_the_page() -> None:
    fields = names("Answer")
    assert ClassifyAnswer.model_fields.keys() <= fields
    assert {f"data[].{name}" for name in Classification.model_fields} <= fields


def test_every_limit_on_the_page_has_the_default_of_its_setting() -> None:
    defaults = dict(Settings())
    limits = [row for row in rows("Limits") if len(row) == 4 and "DRBERT_" in row[1]]
    assert len(limits) > 5
    for _, setting, shown, _ in limits:
        default = defaults[setting.strip("`").removeprefix("DRBERT_").lower()]
        number, _, unit = shown.replace(",", "").partition(" ")
        if default is None:
            assert not number.isdigit(), setting
        else:
            assert float(number) * (2**20 if unit == "MiB" else 1) == default, setting
