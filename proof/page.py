"""
One HTML file without script or network: its style, and the parts that reports are put together from.

Colours are Okabe and Ito's, which colour-blind people tell apart; shapes and words say the same again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from proof.drawing import Html, text

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #59616c; --line: #d5d9df; --paper: #fff; --band: #dfecf7; --edge: #8fb4d6;
  --reference: #0072b2; --candidate: #c14f00; --delayed: #007a59; --control: #8f4374; --good: #00664a; --bad: #a63a00; --open: #6b5900; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a4acb7; --line: #3b414a; --paper: #16181c; --band: #1c3044; --edge: #44698c;
  --reference: #56b4e9; --candidate: #f0a04b; --delayed: #35c79d; --control: #d99ac0; --good: #6fcba6; --bad: #f5a277; --open: #e0cc5c; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --band: #dfecf7; --edge: #6c93b8;
  --reference: #0072b2; --candidate: #c14f00; --delayed: #007a59; --control: #8f4374; --good: #00664a; --bad: #a63a00; --open: #6b5900; } }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem 1rem 4rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .1rem 0 .3rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .3rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .2rem; }
p { margin: .4rem 0; max-width: 46rem; } .soft { color: var(--soft); } small, .small { font-size: .875rem; }
code { font: .875em ui-monospace, monospace; overflow-wrap: anywhere; }
a { color: inherit; text-underline-offset: .15em; } nav { margin: 1.2rem 0 0; } nav a { display: inline-block; padding: .3rem 0; margin-right: 1rem; }
.verdict { border-left: .45rem solid var(--open); padding: .1rem 0 .3rem 1rem; } .verdict svg { width: 2.1rem; height: 2.1rem; vertical-align: -.4rem; margin-right: .5rem; }
.verdict .mark { fill: none; stroke: var(--open); stroke-width: 2.2; stroke-linecap: round; stroke-linejoin: round; } .verdict p { font-size: 1.1rem; }
.verdict .small { font-size: .95rem; } .good { border-color: var(--good); } .good .mark { stroke: var(--good); } .bad { border-color: var(--bad); } .bad .mark { stroke: var(--bad); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1rem; margin: .8rem 0; font-size: .92rem; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { position: relative; overflow-x: auto; margin: .6rem 0; } .scroll:focus-visible { outline: 2px solid var(--reference); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .2rem; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; font-weight: normal; }
thead th { font-weight: 600; color: var(--soft); vertical-align: bottom; } th[scope=row] { position: sticky; left: 0; background: var(--paper); }
td.n, th.n { text-align: right; white-space: nowrap; } .word { font-weight: 600; white-space: nowrap; } .word.good { color: var(--good); } .word.bad { color: var(--bad); } .word.open { color: var(--open); } .word.wrong { color: var(--bad); white-space: normal; font-weight: normal; }
figure { margin: .8rem 0 1.4rem; min-width: 0; } figcaption { margin-bottom: .3rem; font-size: .92rem; } figcaption b { font-weight: 600; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2.5rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .5rem 0; font-size: .875rem; color: var(--soft); } .legend span { white-space: nowrap; }
.legend svg { display: inline-block; width: 1.9rem; height: 1rem; vertical-align: -.18rem; margin-right: .35rem; overflow: visible; }
svg.sided { margin-left: 3.3rem; width: calc(100% - 4.6rem); }
svg { display: block; overflow: visible; font: 13px system-ui, sans-serif; } h1 svg { display: inline; }
svg text { fill: var(--ink); stroke: var(--paper); stroke-width: 3px; paint-order: stroke; font-variant-numeric: tabular-nums; } svg text.soft { fill: var(--soft); font-size: 12px; }
svg text.on { fill: #000; stroke: none; font-size: 12px; }
.grid { stroke: var(--line); } .tick { stroke: var(--soft); } .zero { stroke: var(--soft); stroke-dasharray: 3 3; } .band { fill: var(--band); } .edge { stroke: var(--edge); stroke-width: 1.5; }
.whisker { stroke-width: 2.5; } .fine { stroke-width: 1; stroke-opacity: .75; } .mean { stroke: var(--ink); stroke-width: 2; } .expected { stroke: var(--ink); stroke-width: 2.5; stroke-dasharray: 2 2; }
polyline { fill: none; } .thin { stroke-width: 1.2; } .broad { stroke-width: 6; stroke-opacity: .5; } .dashed { stroke-width: 2; stroke-dasharray: 5 3; }
.reference { stroke: var(--reference); } .candidate { stroke: var(--candidate); } .delayed { stroke: var(--delayed); } .control { stroke: var(--control); } .bad { stroke: var(--bad); }
circle, polygon { stroke-width: 1.5; } .circle.reference, polygon.reference { fill: var(--reference); } .circle.candidate, polygon.candidate { fill: var(--candidate); }
.circle.delayed, polygon.delayed { fill: var(--delayed); } .circle.control, polygon.control { fill: var(--control); } .circle.bad, polygon.bad { fill: var(--bad); }
.ring { fill: var(--paper); stroke-width: 2; } .restart { fill: var(--candidate); stroke: var(--paper); stroke-width: 1; }
.phase { stroke: var(--paper); } .tokenize { fill: #56b4e9; } .queue { fill: #e69f00; } .inference { fill: #4db898; } .rest { fill: #c4c8ce; } .elapsed { fill: #c4c8ce; }
.levels { list-style: none; margin: 1rem 0; padding: 0; } .levels li { padding: .5rem 0; border-top: 1px solid var(--line); } .levels p { margin: 0; font-size: .875rem; }
@media (max-width: 36rem) { h1 { font-size: 1.6rem; } th, td { padding-right: .6rem; } .wide :is(th, td) { white-space: nowrap; }
  .cards :is(table, caption, tbody) { display: block; } .cards thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; white-space: nowrap; }
  .cards tr { display: block; border-bottom: 1px solid var(--line); padding: .35rem 0; } .cards :is(th[scope=row], td) { display: flex; justify-content: space-between; border: 0; padding: .05rem 0; }
  .cards th[scope=row] { font-weight: 600; position: static; } .cards td::before { content: attr(data-name); color: var(--soft); padding-right: 1rem; } .cards td:empty { display: none; } }
@page { margin: 14mm 12mm; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } nav { display: none; } h2 { margin-top: 1.6rem; } h2, h3, figcaption, section > .soft, .legend { break-after: avoid; } .pair { grid-template-columns: 1fr 1fr; }
  figure, table, tr, p, li, .verdict, dl { break-inside: avoid; } .scroll { overflow: visible; } th[scope=row] { position: static; } table { font-size: 8.5pt; } thead { display: table-header-group; } }
"""


def page(title: str, parts: Iterable[Html]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
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
    return Html('<div class="legend">' + "".join(
        f'<span><svg viewBox="0 0 30 16" aria-hidden="true">{shapes}</svg>{text(words)}</span>' for shapes, words in entries
    ) + "</div>")


def word(value: object, tone: str) -> Html:
    return Html(f'<span class="word {tone}">{text(value)}</span>')


def code(value: object) -> Html:
    return Html(f"<code>{text(value)}</code>")


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]], numbers: Iterable[int] = (), kind: str = "cards") -> Html:
    """A table whose first column names the row. On a phone `cards` turns rows into lists; `wide` scrolls by itself; `plain` wraps."""
    right = set(numbers)
    names = [text(value) for value in head]

    def number(i: int) -> str:
        return ' class="n"' if i in right else ""

    def cell(i: int, value: object) -> str:
        if i == 0:
            return f'<th scope="row" role="rowheader"{number(i)}>{text(value)}</th>'
        return f'<td role="cell" data-name="{names[i]}"{number(i)}>{text(value)}</td>'

    top = "".join(f'<th scope="col" role="columnheader"{number(i)}>{name}</th>' for i, name in enumerate(names))
    body = "".join('<tr role="row">' + "".join(cell(i, value) for i, value in enumerate(row)) + "</tr>" for row in rows)
    # The roles are said again because a table that is shown as cards would lose them.
    return Html(
        f'<div class="scroll {kind}" role="region" tabindex="0" aria-label="{text(caption)}"><table role="table"><caption>{text(caption)}</caption>'
        f'<thead role="rowgroup"><tr role="row">{top}</tr></thead><tbody role="rowgroup">{body}</tbody></table></div>'
    )


def facts(entries: Iterable[tuple[object, object]]) -> Html:
    return Html("<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in entries) + "</dl>")
