"""
Breaks the service in every way there is, counts what became of each request, and prints a table.

    python -m tests.chaos                                            ten minutes; make chaos
    python -m tests.chaos --long --out benchmarks/RELIABILITY.md     an hour

Ends with 0 if everything held.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.findings import Findings, Table, Target, markdown, read, write
from command import BadUsage, CommandError, Parser, finish
from service.server import allow_many_connections
from tests.chaos import bombs, hostile, load, rolling, scenarios
from tests.chaos.scenarios import Row

LOST = "accepted requests lost"


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m tests.chaos", description="Break the service in every way there is."
    )
    parser.add_argument(
        "--long", action="store_true", help="an hour: the figures of benchmarks/RELIABILITY.md"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only scenarios whose names hold one of these"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="write a Markdown page and its numbers as JSON, after each scenario",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out holds already and do the rest"
    )
    given = parser.parse_args(arguments)
    chosen = {
        name: run
        for name, run in plan(given.long).items()
        if given.only is None or any(word in name for word in given.only)
    }
    if not chosen:
        raise BadUsage(
            f"No scenario is called {' or '.join(given.only)}; there are {', '.join(plan(False))}."
        )
    allow_many_connections()
    # What makes the whole page: what was resumed is a part of it.
    only = given.only if given.only is not None and not given.resume else []
    command = " ".join(
        [
            "python -m tests.chaos",
            *["--long"] * given.long,
            *(["--only", *only] if only else []),
            *(["--out", str(given.out)] if given.out else []),
        ]
    )
    rows = kept(given.out) if given.resume and given.out is not None else {}
    for name, run in chosen.items():
        if name in rows:
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        made = run()
        rows[name] = asyncio.run(made) if asyncio.iscoroutine(made) else made
        print(
            f"  {'holds' if rows[name].holds else 'BROKEN'}: {rows[name].figures}",
            file=sys.stderr,
            flush=True,
        )
        if given.out is not None:
            write(given.out, command, [findings(rows)])
    print(markdown(findings(rows)))
    broken = [row.scenario for row in rows.values() if not row.holds]
    if broken:
        raise CommandError(f"Broken: {', '.join(broken)}.")
    return 0


def plan(long: bool) -> dict[str, Callable[[], Row | Coroutine[Any, Any, Row]]]:
    return {
        "schemas": lambda: scenarios.schemas(1000 if long else 60),
        "half requests": lambda: scenarios.half_requests(1000 if long else 300),
        "overload with defaults": lambda: load.overload(120 if long else 40),
        "one heavy list beside light callers": lambda: load.one_list(60 if long else 15),
        "one list of short texts beside light callers": lambda: load.one_list(
            60 if long else 10, "short"
        ),
        "eight lists beside light callers": lambda: load.eight_lists(60 if long else 15),
        "cancellations": lambda: scenarios.cancellations(60 if long else 8),
        "termination": lambda: scenarios.termination(20 if long else 3),
        "rolling restart": lambda: rolling.rolling_restart(5 if long else 1),
        "trailers": lambda: hostile.trailers(60 if long else 10),
        "one-byte chunks": lambda: hostile.one_byte_chunks(60 if long else 10),
        "header floods": lambda: hostile.header_floods(60 if long else 10),
        "never readers": lambda: hostile.never_readers(60 if long else 10),
        "kill": scenarios.kill_and_restart,
        "reload": lambda: scenarios.reload(50 if long else 5),
        **{
            f"engine {how}": partial(scenarios.engine, how)
            for how in ("raises", "nan", "few", "stalls", "breaks")
        },
        "JSON bombs": lambda: bombs.bombs(60 if long else 10),
        "small JSON bombs": lambda: bombs.small_bombs(60 if long else 10),
        "slow long texts": lambda: bombs.slow_texts(60 if long else 10),
        "metrics scrapers": lambda: bombs.scrapers(60 if long else 10),
        "soak": lambda: scenarios.soak(1800 if long else 60),
    }


def findings(rows: Mapping[str, Row]) -> Findings:
    ordered = [rows[name] for name in plan(False) if name in rows]
    table = Table(
        "",
        ("what went wrong", "how", "requests", "lost", "hung", "what was seen", "when"),
        [
            [
                row.scenario,
                row.done,
                f"{row.requests:,}",
                str(row.lost),
                str(row.hung),
                row.figures,
                row.when,
            ]
            for row in ordered
        ],
    )
    lost, hung = sum(row.lost for row in ordered), sum(row.hung for row in ordered)
    targets = [
        Target(LOST, "0", str(lost), lost == 0),
        Target("requests without an end", "0", str(hung), hung == 0),
    ]
    targets += [
        Target(row.scenario, "holds", "held" if row.holds else "did not", row.holds)
        for row in ordered
    ]
    return Findings(
        "reliability",
        "What becomes of requests when things go wrong?",
        [table],
        targets,
        {name: asdict(row) for name, row in rows.items()},
    )


def kept(out: Path) -> dict[str, Row]:
    """The scenarios that a page holds already."""
    return {name: Row(**values) for found in read(out) for name, values in found.values.items()}


if __name__ == "__main__":
    finish(main)
