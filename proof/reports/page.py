"""
One HTML page without script or network: the building blocks of its data, and the templates.

Colours are those of Okabe and Ito, which colour-blind readers can distinguish; shapes and words
carry the same information.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from proof.reports.formatting import escape_text
from proof.verdict.schema import SCHEMA_VERSION

Tone = Literal["good", "bad", "open"]
"""Colour of a judgement: it holds, it fails, it is undecided."""

HERE = Path(__file__).parent

ENVIRONMENT = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    finalize=escape_text,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.globals["style_sheet"] = Markup((HERE / "style.css").read_text(encoding="utf-8"))


def render(template: str, **variables: object) -> str:
    """Return a template of templates/, rendered; a variable that it misses is an error."""
    return ENVIRONMENT.get_template(template).render(variables)


@functools.cache
def renderer_version() -> str:
    """Return 16 digits that change with this package's code, templates and styles.

    Every page names the version that made it: the same version makes the same page from the same
    evidence, byte for byte.
    """
    files = (path for path in HERE.rglob("*") if path.suffix in (".py", ".j2", ".css"))
    digest = hashlib.sha256(f"schema {SCHEMA_VERSION}".encode())
    for path in sorted(files):
        digest.update(f"\n{path.relative_to(HERE).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """Text with a style: a judgement in colour, or code."""

    text: str
    tone: Tone | None = None
    is_code: bool = False


Row = Sequence[str | Cell]


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    is_numeric: bool = False
    """Whether the column is aligned to the right."""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    layout: Literal["cards", "wide", "plain"] = "cards"
    """On a phone, `cards` turns rows into lists, `wide` scrolls by itself, and `plain` wraps."""


@dataclass(frozen=True)
class Figure:
    """A chart of one level."""

    level: str
    caption: str
    """What the chart shows; it follows the level's name."""
    chart: Markup


def optional_table(table: Table) -> Table | None:
    """Return the table, or None if it has no rows."""
    return table if table.rows else None
