"""
Proves that a model swap adds no latency, or that it does.

    python -m proof identity artifacts/bert artifacts/drbert  the same work? 0 same, 1 different
    python -m proof capacity PLAN                  how many texts a second can the reference answer?
    python -m proof plan evidence/<A/A run> --template PLAN --out PLAN
                                                   how many restarts does the claim need here?
    python -m proof run examples/plans/demo.toml   the same time? 0 equivalent, 1 not,
                                                   2 inconclusive, 3 invalid
    python -m proof run --resume evidence/<run>    go on with an interrupted run
    python -m proof verify-claim A B evidence/<run>
                                                   identity and judge: the gate for a pipeline
    python -m proof judge evidence/<run>           judge a run again; the same codes
    python -m proof report evidence/<run>          write its report again; with --markdown, print a
                                                   short one
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from command import BadUsage, Parser
from proof.reports import markdown, report
from proof.verdict import claim, identity, judge, schema


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m proof",
        description="Prove that a model swap adds no latency, or that it does.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    comparing = commands.add_parser("identity", help="compare what two artifacts compute")
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    comparing.add_argument("--json", action="store_true", help="print everything that was compared")
    measuring = commands.add_parser(
        "capacity", help="measure the reference's capacity, which a plan's rates are parts of"
    )
    measuring.add_argument("plan", type=Path)
    measuring.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="how long each slice of one arm takes (default: 5)",
    )
    planning = commands.add_parser(
        "plan", help="size a plan from an A/A pilot, so that it can show what it claims"
    )
    planning.add_argument(
        "pilot", type=Path, help="evidence of a run whose arms are all the reference"
    )
    planning.add_argument(
        "--template", type=Path, required=True, help="the plan whose claim is to be sized"
    )
    planning.add_argument(
        "--out", type=Path, required=True, help="the plan to write; its pilot goes beside it"
    )
    planning.add_argument(
        "--power",
        type=float,
        default=0.8,
        help="how often equal models are to come out equivalent (default: 0.8)",
    )
    planning.add_argument(
        "--minutes", type=float, default=120.0, help="the longest the run may take (default: 120)"
    )
    planning.add_argument(
        "--floor-us",
        type=float,
        default=0.0,
        help="no margin is tighter than so many microseconds (default: 0)",
    )
    running = commands.add_parser("run", help="carry out a plan, judge it and report")
    running.add_argument("plan", type=Path, nargs="?")
    running.add_argument(
        "--resume", type=Path, metavar="EVIDENCE", help="go on with an interrupted run instead"
    )
    running.add_argument(
        "--evidence", type=Path, default=Path("evidence"), help="where runs go (default: evidence)"
    )
    verifying = commands.add_parser(
        "verify-claim", help="identity and judge in one: the gate for a pipeline"
    )
    verifying.add_argument("a", type=Path, metavar="REFERENCE")
    verifying.add_argument("b", type=Path, metavar="CANDIDATE")
    verifying.add_argument("evidence", type=Path)
    judging = commands.add_parser("judge", help="judge a sealed run again")
    judging.add_argument("evidence", type=Path)
    reporting = commands.add_parser(
        "report", help="write a run's report again, outside its sealed folder"
    )
    reporting.add_argument("evidence", type=Path)
    form = reporting.add_mutually_exclusive_group()
    form.add_argument("--out", type=Path, help="the file to write (default: <run>.html here)")
    form.add_argument(
        "--markdown", action="store_true", help="print a short report for a pull request instead"
    )
    given = parser.parse_args(arguments)
    handlers: dict[str, Callable[[], int]] = {
        "identity": lambda: _identity(given.a, given.b, given.json),
        "capacity": lambda: _capacity(given.plan, given.seconds),
        "plan": lambda: _plan(
            given.pilot, given.template, given.out, given.power, given.minutes, given.floor_us
        ),
        "run": lambda: _run(given.plan, given.resume, given.evidence),
        "verify-claim": lambda: _verify(given.a, given.b, given.evidence),
        "judge": lambda: _judge(given.evidence),
        "report": lambda: _report(
            given.evidence,
            given.out or Path(f"{given.evidence.resolve().name}.html"),
            given.markdown,
        ),
    }
    return handlers[given.command]()


def _identity(a: Path, b: Path, as_json: bool) -> int:
    result = identity.compare(a, b)
    print(json.dumps(result, indent=2) if as_json else identity.describe(result))
    return 0 if result["same"] else 1


def _capacity(path: Path, seconds: float) -> int:
    from proof.sizing.capacity import capacity_per_s

    print(f"capacity_per_s = {capacity_per_s(path, seconds):.4g}")
    return 0


def _plan(
    pilot: Path, template: Path, out: Path, power: float, minutes: float, floor_us: float
) -> int:
    from proof.plans.plan_file import read_plan, to_toml
    from proof.sizing import power as powers
    from proof.sizing.pilot import read_pilot

    if not 0 < power < 1:
        raise BadUsage(f"--power {power} is no probability; give 0.8 or 0.95.")
    if out.exists():
        raise BadUsage(
            f"{out} exists; a plan is not written over, for runs may have been made under it."
        )
    found = read_pilot(pilot)
    plan, offer = powers.size_plan(found, read_plan(template), power, minutes, floor_us)
    said = powers.describe(found, offer)
    plan = dataclasses.replace(plan, path=out)
    out.write_text(
        to_toml(
            plan,
            f"Sized by `python -m proof plan` from a pilot of {found.restarts} restarts.\n"
            + said.splitlines()[-1],
        ),
        encoding="utf-8",
    )
    plan.pilot_path.write_text(found.to_json(), encoding="utf-8")
    print(said)
    return 0


def _run(plan: Path | None, interrupted: Path | None, evidence: Path) -> int:
    from proof.measuring.run import resume_run, run_plan

    if (plan is None) == (interrupted is None):
        raise BadUsage("Give a plan to run, or --resume and the folder of an interrupted run.")
    folder, found = resume_run(interrupted) if interrupted is not None else run_plan(plan, evidence)  # type: ignore[arg-type]
    print(schema.describe(found))
    print(f"report: {folder / 'report.html'}")
    return schema.EXIT_CODES[found.verdict]


def _verify(reference: Path, candidate: Path, evidence: Path) -> int:
    found = claim.verify(reference, candidate, evidence)
    print(claim.describe(found, evidence))
    return found.exit_code


def _judge(folder: Path) -> int:
    found = judge.judge_run(folder)
    schema.check_committed(folder / "verdict.json", found)
    print(schema.describe(found))
    return schema.EXIT_CODES[found.verdict]


def _report(folder: Path, out: Path, as_markdown: bool) -> int:
    found = judge.judge_run(folder)
    print(markdown.render(found) if as_markdown else report.write(folder, found, out))
    return 0
