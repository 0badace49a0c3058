"""
Proves that a model swap adds no latency, or that it does.

    python -m proof identity artifacts/bert artifacts/drbert      the same work?           0 same, 1 different
    python -m proof run examples/plans/demo.toml                  the same time?           0 equivalent, 1 not, 2 inconclusive, 3 invalid
    python -m proof judge evidence/<run>                          judge a run again        the same codes
    python -m proof report evidence/<run>                         write its report again
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from command import Parser
from proof import identity, judge, report
from proof.evidence import Refused


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m proof", description="Prove that a model swap adds no latency, or that it does.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    comparing = commands.add_parser("identity", help="compare what two artifacts compute")
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    comparing.add_argument("--json", action="store_true", help="print everything that was compared")
    running = commands.add_parser("run", help="carry out a plan, judge it and report")
    running.add_argument("plan", type=Path)
    running.add_argument("--evidence", type=Path, default=Path("evidence"), help="where runs go (default: evidence)")
    judging = commands.add_parser("judge", help="judge a sealed run again")
    judging.add_argument("evidence", type=Path)
    reporting = commands.add_parser("report", help="write a run's report again, outside its sealed folder")
    reporting.add_argument("evidence", type=Path)
    reporting.add_argument("--out", type=Path, help="the file to write (default: <run>.html here)")
    given = parser.parse_args(arguments)
    handlers: dict[str, Callable[[], int]] = {
        "identity": lambda: _identity(given.a, given.b, given.json),
        "run": lambda: _run(given.plan, given.evidence),
        "judge": lambda: _judge(given.evidence),
        "report": lambda: _report(given.evidence, given.out or Path(f"{given.evidence.resolve().name}.html")),
    }
    return handlers[given.command]()


def _identity(a: Path, b: Path, as_json: bool) -> int:
    result = identity.compare(a, b)
    print(json.dumps(result, indent=2) if as_json else identity.describe(result))
    return 0 if result["same"] else 1


def _run(plan: Path, evidence: Path) -> int:
    from proof.run import run

    folder, verdict = run(plan, evidence)
    print(judge.describe(verdict))
    print(f"report: {folder / 'report.html'}")
    return judge.EXIT_CODES[verdict["verdict"]]


def _judge(folder: Path) -> int:
    verdict = judge.judge(folder)
    committed = folder / "verdict.json"
    if committed.is_file():
        try:
            before = json.loads(committed.read_text())
            version = before.get("schema_version")
        except (ValueError, AttributeError) as error:
            raise Refused(f"{committed} cannot be read: {error}.") from None
        if version != judge.SCHEMA_VERSION:
            raise Refused(f"{committed}: schema_version {version!r} is unknown; this judge writes {judge.SCHEMA_VERSION}.")
        if before.get("verdict") != verdict["verdict"]:
            raise Refused(f"{committed} says {before.get('verdict')}, the evidence says {verdict['verdict']}.")
        if (where := judge.first_difference(before, verdict)) is not None:
            raise Refused(f"{committed} does not follow from the evidence: {where}.")
    print(judge.describe(verdict))
    return judge.EXIT_CODES[verdict["verdict"]]


def _report(folder: Path, out: Path) -> int:
    print(report.write(folder, judge.judge(folder), out))
    return 0
