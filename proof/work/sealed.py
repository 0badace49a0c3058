"""
work.json as a part of a run's evidence: counted before the run is sealed, checked by the judge.
"""

from __future__ import annotations

from pathlib import Path

from command import BadInput
from proof.evidence.audit import loaded_models
from proof.evidence.store import EvidenceRejected
from proof.plans.plan import Plan, Role
from proof.work.schema import Work, describe, read_work, write_work
from proof.work.workload import choose_method

WORK = "work.json"
ROLES: tuple[Role, Role] = ("reference", "candidate")


def check_countable(plan: Plan) -> None:
    """Raise BadInput or Unavailable if a run could not count what its plan has it count."""
    if plan.work is None:
        return
    if not plan.starts_servers:
        raise BadInput(
            f"{plan.path}: [work] counts artifacts, and its arms are servers of your own."
        )
    choose_method("auto")


def lacks_work(plan: Plan, folder: Path) -> bool:
    """Return whether a run has still to count."""
    return plan.work is not None and not (folder / WORK).exists()


def count_for_run(plan: Plan, folder: Path) -> None:
    """Count the work of reference and candidate, and write work.json, unless it is there."""
    from proof.work.counting import CountOptions, count_work

    if plan.work is None or not lacks_work(plan, folder):
        return
    first, second = (_artifact(plan, role) for role in ROLES)
    options = CountOptions(
        variant=plan.work.variant, lengths=plan.work.lengths, margin=plan.work.margin
    )
    work = count_work(first, second, options)
    write_work(folder / WORK, work)
    print(describe(work), flush=True)


def _artifact(plan: Plan, role: Role) -> Path:
    return Path(plan.arms[plan.indices(role)[0]].artifact or "")


def check_sealed(plan: Plan, folder: Path, is_complete: bool) -> Work | None:
    """Return the counts of a sealed run; None if its plan has it count nothing.

    Raise EvidenceRejected if they contradict themselves, the plan or the artifacts that were
    measured, or if they are missing although all restarts are there.
    """
    path = folder / WORK
    if not path.exists():
        if plan.work is not None and is_complete:
            raise EvidenceRejected(f"{folder} has no {WORK}, and its plan has work counted.")
        return None
    if plan.work is None:
        raise EvidenceRejected(f"{path} is there, and the plan has no work counted.")
    work = read_work(path)
    if work.margin != plan.work.margin:
        raise EvidenceRejected(f"{path}: its margin is {work.margin:g}, not the plan's.")
    models = loaded_models(folder)
    for role, counted in zip(ROLES, work.artifacts, strict=True):
        arm = plan.arms[plan.indices(role)[0]].name
        measured = models.get(arm, {}).get("digest")
        if counted.digest != measured:
            raise EvidenceRejected(
                f"{path} counted another {role} ({counted.digest[:12]}) than the one that was"
                f" measured ({str(measured)[:12]})."
            )
        if counted.variant != plan.work.variant:
            raise EvidenceRejected(
                f"{path} counted {counted.variant[:40]}, and the plan names {plan.work.variant}."
            )
    return work
