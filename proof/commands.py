"""
Prove that a model swap adds no latency, or that it does.

    drbert-prove identity artifacts/bert artifacts/drbert
        do two artifacts do the same work? 0 same, 1 different
    drbert-prove work artifacts/bert artifacts/drbert
        as many instructions for a text? 0 same, 1 different, 2 cannot tell
    drbert-prove capacity PLAN
        how many texts per second can the reference answer, and at which rates is it half busy?
    drbert-prove plan evidence/<A/A run> --template PLAN --out PLAN
        how many restarts does the claim need here?
    drbert-prove run examples/plans/demo.toml
        the same time? 0 equivalent, 1 not, 2 inconclusive, 3 invalid
    drbert-prove run --resume evidence/<run>
        continue an interrupted run
    drbert-prove verify-claim A B evidence/<run>
        identity and judge in one: the gate for a pipeline
    drbert-prove judge evidence/<run>
        judge a run again; the same exit codes as `run`
    drbert-prove report evidence/<run>
        write the report again; with --markdown, print a short one
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from command import BadInput, BadUsage, Parser
from proof.evidence.store import read_manifest_digest
from proof.reports import markdown, report
from proof.verdict import claim, committed, identity, judge, schema, terminal
from proof.work.schema import DEFAULT_MARGIN, read_work, write_work
from proof.work.schema import EXIT_CODES as WORK_EXIT_CODES
from proof.work.schema import describe as describe_work
from proof.work.schema import sentence as work_sentence
from proof.work.sealed import WORK

ARTIFACT = "an artifact's folder, made by drbert-export"
EVIDENCE = "a run's folder, as in evidence/published"
SAME = """\
  0   the same work
  1   different work
"""
CAN_TELL = f"""{SAME}\
  2   cannot tell
"""
VERDICTS = """\
  0   equivalent, or not slower where that was claimed
  1   not equivalent
  2   inconclusive
  3   invalid, or the evidence was changed
"""


COMMANDS = ("identity", "work", "capacity", "plan", "run", "verify-claim", "judge", "report")


def main(arguments: Sequence[str]) -> int:
    """Run a command of `proof` and return its exit code."""
    options = _parser().parse_args(arguments)
    handlers: tuple[Callable[[argparse.Namespace], int], ...] = (
        _identity,
        _work,
        _capacity,
        _plan,
        _run,
        _verify,
        _judge,
        _report,
    )
    return dict(zip(COMMANDS, handlers, strict=True))[options.command](options)


def _parser() -> Parser:
    parser = Parser(
        prog="drbert-prove",
        description="Prove that a model swap adds no latency, or that it does.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    _add_identity(commands)
    _add_work(commands)
    _add_capacity(commands)
    _add_plan(commands)
    _add_run(commands)
    _add_verify_claim(commands)
    judging = commands.add_parser("judge", help="judge a sealed run again", results=VERDICTS)
    judging.add_argument("evidence", type=Path, help=EVIDENCE)
    _add_report(commands)
    return parser


def _add_identity(commands: Any) -> None:
    parser = commands.add_parser(
        "identity", help="compare what two artifacts compute", results=SAME
    )
    _add_artifacts(parser)
    parser.add_argument("--json", action="store_true", help="print everything that was compared")


def _add_work(commands: Any) -> None:
    parser = commands.add_parser(
        "work",
        help="count the instructions that two artifacts execute for a text",
        results=CAN_TELL,
    )
    _add_artifacts(parser)
    parser.add_argument(
        "--texts",
        type=Path,
        help="file with one text on each line (default: texts of some lengths)",
    )
    parser.add_argument(
        "--lengths",
        type=token_counts,
        default=(),
        help="tokens of the texts, such as 8,32 (default: as many as the method affords)",
    )
    parser.add_argument("--quick", action="store_true", help="count fewer and shorter batches")
    _add_variant(parser)
    parser.add_argument(
        "--runtime",
        choices=("auto", "openvino", "onnxruntime"),
        default="auto",
        help="engine that is counted (default: auto, as the service chooses it)",
    )
    parser.add_argument(
        "--method",
        choices=("auto", "counters", "valgrind"),
        default="auto",
        help="hardware counters or Valgrind (default: counters where there are any)",
    )
    parser.add_argument(
        "--margin",
        type=probability,
        default=DEFAULT_MARGIN,
        help="largest relative difference of the same work (default: 0.001)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to this file")


def _add_artifacts(parser: Any) -> None:
    parser.add_argument("a", type=Path, metavar="REFERENCE", help=ARTIFACT)
    parser.add_argument("b", type=Path, metavar="CANDIDATE", help=ARTIFACT)


def _add_variant(parser: Any) -> None:
    parser.add_argument(
        "--variant", default="cpu-fp32", help="variant that is counted (default: cpu-fp32)"
    )


def _add_capacity(commands: Any) -> None:
    parser = commands.add_parser(
        "capacity",
        help="measure the reference's capacity, and the arrival rates of a plan's levels",
    )
    parser.add_argument("plan", type=Path, help="a plan, as in examples/plans")
    parser.add_argument(
        "--seconds",
        type=positive,
        default=5.0,
        help="duration of each slice of one arm, and of each rate, in seconds (default: 5)",
    )


def positive(text: str) -> float:
    """Return a finite number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def probability(text: str) -> float:
    """Return a number between 0 and 1, for argparse."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def non_negative(text: str) -> float:
    """Return a finite number of 0 or above, for argparse."""
    return 0.0 if float(text) == 0 else positive(text)


def token_counts(text: str) -> tuple[int, ...]:
    """Return numbers of 1 to 100,000, separated by commas, for argparse."""
    counts = tuple(map(int, text.split(",")))
    if not all(1 <= count <= 100_000 for count in counts):
        raise argparse.ArgumentTypeError(f"{text} has a length outside 1 to 100,000")
    return counts


def digest(text: str) -> str:
    """Return 16 to 64 hexadecimal digits, for argparse."""
    if not re.fullmatch("[0-9a-fA-F]{16,64}", text):
        raise argparse.ArgumentTypeError(f"{text} is not 16 to 64 hexadecimal digits")
    return text


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan", help="size a plan from an A/A pilot, so that it can show what it claims"
    )
    parser.add_argument(
        "pilot", type=Path, help="evidence of a run whose arms are all the reference"
    )
    parser.add_argument(
        "--template", type=Path, required=True, help="the plan whose claim is to be sized"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the plan to write; its pilot goes next to it"
    )
    parser.add_argument(
        "--power",
        type=probability,
        default=0.8,
        help="probability that equal models come out equivalent (default: 0.8)",
    )
    parser.add_argument(
        "--minutes",
        type=positive,
        default=120.0,
        help="the longest the run may take (default: 120)",
    )
    parser.add_argument(
        "--floor-us",
        type=non_negative,
        default=0.0,
        help="lower bound of every margin in microseconds (default: 0)",
    )


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run", help="execute a plan, judge it and report", results=VERDICTS
    )
    parser.add_argument("plan", type=Path, nargs="?", help="a plan, as in examples/plans")
    parser.add_argument(
        "--resume", type=Path, metavar="EVIDENCE", help="continue an interrupted run instead"
    )
    parser.add_argument(
        "--evidence",
        type=Path,
        default=Path("evidence"),
        help="folder for the evidence of runs (default: evidence)",
    )


def _add_verify_claim(commands: Any) -> None:
    parser = commands.add_parser(
        "verify-claim",
        help="identity and judge in one: the gate for a pipeline",
        results=VERDICTS,
    )
    _add_artifacts(parser)
    parser.add_argument("evidence", type=Path, help=EVIDENCE)
    parser.add_argument(
        "--manifest",
        type=digest,
        metavar="SHA256",
        help="the published digest of the evidence's MANIFEST.sha256, or its first 16 digits",
    )
    parser.add_argument(
        "--plan",
        type=digest,
        metavar="SHA256",
        help="the published digest of its plan.toml, or its first 16 digits",
    )
    parser.add_argument(
        "--allow",
        action="append",
        choices=claim.DIFFERENCES,
        default=[],
        metavar="DIFFERENCE",
        help="accept evidence of another variant, precision, packing, graph, engine or version"
        " than here; repeat it for several",
    )
    parser.add_argument(
        "--work", action="store_true", help="also count both artifacts' instructions, here and now"
    )
    _add_variant(parser)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report", help="write a run's report again, outside its sealed folder"
    )
    parser.add_argument("evidence", type=Path, help=EVIDENCE)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--out", type=Path, help="the file to write (default: <run>.html here)")
    form.add_argument(
        "--markdown", action="store_true", help="print a short report for a pull request instead"
    )


def _identity(options: argparse.Namespace) -> int:
    result = identity.compare(options.a, options.b)
    if options.json:
        same_body = identity.have_same_body(options.a, options.b)
        print(json.dumps(result | {"same_body": same_body}, indent=2))
    else:
        lines = identity.describe(result), identity.describe_body(options.a, options.b)
        print("\n".join(filter(None, lines)))
    return 0 if result["same"] else 1


def _work(options: argparse.Namespace) -> int:
    from proof.work.counting import CountOptions, count_work

    if options.texts is not None and options.lengths:
        raise BadUsage("Give --texts or --lengths, not both: the texts have lengths of their own.")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise BadUsage(f"{options.json} cannot be written: its folder does not exist.")
    counted = count_work(
        options.a,
        options.b,
        CountOptions(
            variant=options.variant,
            runtime=options.runtime,
            method=options.method,
            margin=options.margin,
            lengths=options.lengths,
            texts=options.texts,
            quick=options.quick,
        ),
    )
    if options.json is not None:
        write_work(options.json, counted)
    print(describe_work(counted))
    return WORK_EXIT_CODES[counted.verdict]


def _capacity(options: argparse.Namespace) -> int:
    from proof.sizing.capacity import arrival_rates, capacity_per_s

    capacity = capacity_per_s(options.plan, options.seconds)
    print(f"capacity_per_s = {capacity:.4g}")
    for level, rate in arrival_rates(options.plan, capacity, options.seconds).items():
        print(f"[level.{level}] rate_per_s = {rate:.4g}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from proof.plans.plan_file import read_plan, to_toml
    from proof.sizing.pilot import read_pilot
    from proof.sizing.power import describe, size_plan

    if not 0 < options.power < 1:
        raise BadUsage(f"--power {options.power} is no probability; give 0.8 or 0.95.")
    if options.out.exists():
        raise BadUsage(
            f"{options.out} exists; a plan is not overwritten, because runs may have been made"
            " under it."
        )
    pilot = read_pilot(options.pilot)
    template = read_plan(options.template, is_template=True)
    plan, size = size_plan(pilot, template, options.power, options.minutes, options.floor_us)
    plan = dataclasses.replace(plan, path=options.out)
    description = describe(pilot, size)
    comment = (
        f"Sized by `drbert-prove plan` from a pilot of {pilot.restarts} restarts.\n"
        + description.splitlines()[-1]
    )
    plan.path.write_text(to_toml(plan, comment), encoding="utf-8")
    plan.pilot_path.write_text(pilot.to_json(), encoding="utf-8")
    print(description)
    return 0


def _run(options: argparse.Namespace) -> int:
    from proof.measuring.run import resume_run, run_plan

    if (options.plan is None) == (options.resume is None):
        raise BadUsage("Give a plan to run, or --resume and the folder of an interrupted run.")
    if options.resume is not None:
        folder, verdict = resume_run(options.resume)
    else:
        folder, verdict = run_plan(options.plan, options.evidence)
    print(terminal.describe(verdict))
    print(f"report: {folder / 'report.html'}")
    return schema.EXIT_CODES[verdict.verdict]


def _verify(options: argparse.Namespace) -> int:
    verified = claim.verify(
        options.a,
        options.b,
        options.evidence,
        options.manifest,
        options.plan,
        options.allow,
    )
    note = report.check_page(options.evidence, verified.verdict)
    print(claim.describe(verified, options.evidence))
    _print_note(note)
    _print_sealed_work(options.evidence)
    if not options.work:
        return verified.exit_code
    from proof.work.counting import CountOptions, count_work

    counted = count_work(options.a, options.b, CountOptions(variant=options.variant))
    print(describe_work(counted))
    return verified.exit_code or WORK_EXIT_CODES[counted.verdict]


def _judge(options: argparse.Namespace) -> int:
    verdict, note = _judge_again(options.evidence)
    print(terminal.describe(verdict))
    _print_sealed_work(options.evidence)
    print(f"manifest {read_manifest_digest(options.evidence)}")
    print(f"plan {verdict.plan.digest}")
    _print_note(note)
    return schema.EXIT_CODES[verdict.verdict]


def _judge_again(evidence: Path) -> tuple[schema.Verdict, str]:
    """Return the verdict on a run, and what could not be compared.

    Raise EvidenceRejected if the committed verdict or page is not the one that follows.
    """
    verdict = judge.judge_run(evidence)
    committed.check_committed(evidence / "verdict.json", verdict)
    return verdict, report.check_page(evidence, verdict)


def _print_note(note: str) -> None:
    if note:
        print(f"note: {note}")


def _print_sealed_work(evidence: Path) -> None:
    """Print the counts of a run that has some."""
    path = evidence / WORK
    if path.exists():
        print(describe_work(read_work(path)))


def _report(options: argparse.Namespace) -> int:
    verdict, note = _judge_again(options.evidence)
    if options.markdown:
        print(markdown.render(verdict))
        if (options.evidence / WORK).exists():
            counted = read_work(options.evidence / WORK)
            print(f"\n**{counted.verdict} work** {markdown.escape(work_sentence(counted))}")
        if note:
            print(f"\n{note}")
        return 0
    path = options.out or Path(f"{options.evidence.resolve().name}.html")
    if path.resolve().is_relative_to(options.evidence.resolve()):
        raise BadInput(
            f"{path} would be in the sealed folder {options.evidence}, where a further file counts"
            " as a change; give --out with another place."
        )
    print(report.write(options.evidence, verdict, path))
    _print_note(note)
    return 0
