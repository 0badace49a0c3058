"""
One HTML file without script or network: its style, and the parts that reports are put together
from.

Colours are Okabe and Ito's, which colour-blind people tell apart; shapes and words say the same
again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from proof.reports.drawing import Html, text

STYLE = "\n" + Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def page(title: str, parts: Iterable[Html]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><meta name="viewport"'
        ' content="width=device-width, initial-scale=1"/>'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def section(name: str, title: str, *parts: Html) -> Html:
    """A part of the page that #name leads to."""
    return Html(f'<section id="{name}"><h2>{text(title)}</h2>\n' + "\n".join(parts) + "</section>")


def paragraph(value: object, soft: bool = True) -> Html:
    return Html(f'<p class="{"soft" if soft else "plain"}">{text(value)}</p>')


def heading(value: object) -> Html:
    return Html(f"<h3>{text(value)}</h3>")


def figure(caption: object, *parts: Html) -> Html:
    return Html(f"<figure><figcaption>{text(caption)}</figcaption>{''.join(parts)}</figure>")


def pairs(figures: Iterable[Html]) -> Html:
    """Figures side by side where there is room."""
    return Html(f'<div class="pair">{"".join(figures)}</div>')


def legend(entries: Iterable[tuple[str, str]]) -> Html:
    """(shapes in a picture of 30 × 16 pixels, words)"""
    return Html(
        '<div class="legend">'
        + "".join(
            f'<span><svg viewBox="0 0 30 16" aria-hidden="true">{shapes}</svg>{text(words)}</span>'
            for shapes, words in entries
        )
        + "</div>"
    )


def word(value: object, tone: str) -> Html:
    return Html(f'<span class="word {tone}">{text(value)}</span>')


def code(value: object) -> Html:
    return Html(f"<code>{text(value)}</code>")


def table(
    caption: str,
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    numbers: Iterable[int] = (),
    kind: str = "cards",
) -> Html:
    """A table whose first column names the row. On a phone `cards` turns rows into lists; `wide`
    scrolls by itself; `plain` wraps.
    """
    right = set(numbers)
    names = [text(value) for value in head]

    def number(i: int) -> str:
        return ' class="n"' if i in right else ""

    def cell(i: int, value: object) -> str:
        if i == 0:
            return f'<th scope="row" role="rowheader"{number(i)}>{text(value)}</th>'
        return f'<td role="cell" data-name="{names[i]}"{number(i)}>{text(value)}</td>'

    top = "".join(
        f'<th scope="col" role="columnheader"{number(i)}>{name}</th>'
        for i, name in enumerate(names)
    )
    body = "".join(
        '<tr role="row">' + "".join(cell(i, value) for i, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    # The roles are said again because a table that is shown as cards would lose them.
    return Html(
        f'<div class="scroll {kind}" role="region" tabindex="0" aria-label="{text(caption)}"><table'
        f' role="table"><caption>{text(caption)}</caption><thead role="rowgroup"><tr'
        f' role="row">{top}</tr></thead><tbody role="rowgroup">{body}</tbody></table></div>'
    )


def facts(entries: Iterable[tuple[object, object]]) -> Html:
    return Html(
        "<dl>"
        + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in entries)
        + "</dl>"
    )
