"""
What a report tells of the artifacts and of the place: identity.json and environment.json in words.

Both may hold more than is known here, or nothing; whatever is there is shown.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from proof.reports.drawing import Html, text
from proof.reports.page import code, facts, heading, paragraph, table, word

# How a loaded model is told, and what of it.
MODEL = ("digest", "variant", "runtime", "device", "precision", "parameters", "encoder_digest")


def same_work(compared: Mapping[str, Any], controls: Collection[str]) -> Html:
    """Each candidate and control against the reference; controls should differ."""
    if not compared:
        return paragraph(
            "The artifacts were not compared: the run did not start the servers itself."
        )
    parts = []
    for name, result in compared.items():
        said = (
            word("same work", "good")
            if result.get("same")
            else (
                word("other work, as a control should", "good")
                if name in controls
                else word("other work", "bad")
            )
        )
        parts.append(Html(f"{heading(Html(f'{text(name)}: {said}'))}"))
        if result.get("same"):
            parts.append(
                paragraph(
                    "The same encoder graph, head, tokenizer, sizes and precision as the reference:"
                    " the same kernels in the same order on the same shapes.",
                    soft=False,
                )
            )
        else:
            lead = (
                "The same encoder as the reference, but:"
                if result.get("same_encoder")
                else "Not the reference's graph:"
            )
            items = "".join(
                f"<li>{text(item['what'].replace('_', ' '))}: {text(item['detail'])}</li>"
                for item in result.get("differences", [])
            )
            parts.append(Html(f'<p>{lead}</p><ul class="small">{items}</ul>'))
        parts.append(_graphs(name, result))
    return Html("\n".join(parts))


def _graphs(name: str, result: Mapping[str, Any]) -> Html:
    rows: list[tuple[object, ...]] = []
    for variant, parts in result.get("variants", {}).items():
        for part, found in parts.items():
            if isinstance(found, Mapping):
                digests = [code(digest[:16]) for digest in found["digests"]]
                rows.append(
                    (
                        f"{variant} {part}",
                        _same(found["digests"]),
                        *digests,
                        " and ".join(f"{nodes:,}" for nodes in found["nodes"]),
                    )
                )
            else:
                rows.append(
                    (
                        f"{variant} {part.replace('_', ' ')}",
                        _same(found),
                        *(_told(value) for value in found),
                        "",
                    )
                )
    rows += [
        (what.replace("_", " "), _same(result[what]), *(_told(value) for value in result[what]), "")
        for what in ("parameters", "flops_per_token")
        if what in result
    ]
    return (
        table(
            f"Graphs of the reference and of {name}",
            ("", "", "reference", name, "nodes"),
            rows,
            kind="wide",
        )
        if rows
        else Html("")
    )


def _same(pair: Sequence[object]) -> str:
    return "same" if pair[0] == pair[1] else "differs"


def environment(found: Mapping[str, Any]) -> Html:
    """Machine, libraries, server and what it had loaded."""
    server = found.get("server", {})
    here = [
        (name.replace("_", " "), _told(value)) for name, value in found.items() if name != "server"
    ]
    here += [
        (f"server {name}".replace("_", " "), _told(value))
        for name, value in server.items()
        if name != "models"
    ]
    parts = [facts(here) if here else paragraph("Nothing was written down.")]
    models: Mapping[str, Mapping[str, Any]] = server.get("models", {})
    if models:
        columns = [name for name in MODEL if any(name in model for model in models.values())]
        rows = [
            (arm, *(_cell(name, model.get(name, "")) for name in columns))
            for arm, model in sorted(models.items())
        ]
        head = [name.replace("_", " ") for name in columns]
        parts.append(table("Loaded models, by arm", ("arm", *head), rows, kind="wide"))
    return Html("\n".join(parts))


def _cell(name: str, value: Any) -> object:
    return code(str(value)[:16]) if name.endswith("digest") else _told(value)


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
