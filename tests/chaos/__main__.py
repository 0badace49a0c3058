"""
Break the service in many ways, count the outcome of every request, and print a table.

    python -m tests.chaos                                            ten minutes; make chaos
    python -m tests.chaos --long --out benchmarks/RELIABILITY.md     an hour

The exit code is 0 if every scenario held.
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
    """Run the scenarios and print the table; raise CommandError if one did not hold."""
    parser = Parser(prog="python -m tests.chaos", description="Break the service in many ways.")
    parser.add_argument(
        "--long", action="store_true", help="an hour: the figures of benchmarks/RELIABILITY.md"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only scenarios whose names contain one of these"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="write a Markdown page and its numbers as JSON, after each scenario",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the scenarios that --out already has and run the rest",
    )
    options = parser.parse_args(arguments)
    chosen = {
        name: run
        for name, run in plan(options.long).items()
        if options.only is None or any(word in name for word in options.only)
    }
    if not chosen:
        known = ", ".join(plan(False))
        raise BadUsage(f"No scenario is called {' or '.join(options.only)}; there are {known}.")
    allow_many_connections()
    # The command that produces the whole page, with the scenarios that were resumed.
    only = options.only if options.only is not None and not options.resume else []
    command = " ".join(
        [
            "python -m tests.chaos",
            *["--long"] * options.long,
            *(["--only", *only] if only else []),
            *(["--out", str(options.out)] if options.out else []),
        ]
    )
    rows = stored_rows(options.out) if options.resume and options.out is not None else {}
    for name, run in chosen.items():
        if name in rows:
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        result = run()
        rows[name] = asyncio.run(result) if asyncio.iscoroutine(result) else result
        verdict = "holds" if rows[name].holds else "BROKEN"
        print(f"  {verdict}: {rows[name].figures}", file=sys.stderr, flush=True)
        if options.out is not None:
            write(options.out, command, [findings(rows)])
    print(markdown(findings(rows)))
    broken = [row.scenario for row in rows.values() if not row.holds]
    if broken:
        raise CommandError(f"Broken: {', '.join(broken)}.")
    return 0


def plan(long: bool) -> dict[str, Callable[[], Row | Coroutine[Any, Any, Row]]]:
    """Return the scenarios by name, in order; `long` ones take an hour together."""
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
            f"engine {failure}": partial(scenarios.engine, failure)
            for failure in ("raises", "nan", "few", "stalls", "breaks")
        },
        "JSON bombs": lambda: bombs.bombs(60 if long else 10),
        "small JSON bombs": lambda: bombs.small_bombs(60 if long else 10),
        "slow long texts": lambda: bombs.slow_texts(60 if long else 10),
        "metrics scrapers": lambda: bombs.scrapers(60 if long else 10),
        "soak": lambda: scenarios.soak(1800 if long else 60),
    }


def findings(rows: Mapping[str, Row]) -> Findings:
    """Return the table and targets of the scenarios that have run."""
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


def stored_rows(out: Path) -> dict[str, Row]:
    """Return the rows by scenario that a page already has."""
    rows = {}
    for stored in read(out):
        for name, values in stored.values.items():
            rows[name] = Row(**values)
    return rows


if __name__ == "__main__":
    finish(main)
