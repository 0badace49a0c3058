"""
What a plan may claim and ask for, beyond the types of its values.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from urllib.parse import urlsplit

from command import BadInput
from proof.plans.dialects import DIALECTS
from proof.plans.plan import (
    ADJUSTED,
    DILATION,
    FEWEST_IN_SLICE,
    FEWEST_IN_SLICES,
    FROM_SERVER,
    MOST_GAIN,
    Arm,
    Level,
    Plan,
    Role,
)

NAME = re.compile(r"(?!\.)[^/\x00-\x1f\x7f]{1,80}")
"""A plan's name, which becomes part of a folder's."""
MOST_CALM_S = 3600.0
MOST_REQUESTS = 2_000_000
"""Most requests of one level in a restart: its schedule and its rows fit into memory."""


def check_plan(plan: Plan, is_template: bool = False) -> None:
    """Raise BadInput if values contradict each other, or ask for more than can be.

    A template has a claim, and not yet the numbers that a pilot gives.
    """
    for level in plan.levels:
        _check_size(plan, level)
    if not NAME.fullmatch(plan.name):
        raise BadInput(
            f"{plan.path}: name = {plan.name[:80]!r} cannot name a folder; give 1 to 80 characters"
            " without slashes and control characters, and no dot in front."
        )
    if plan.wait_for_calm_s > MOST_CALM_S:
        raise BadInput(
            f"{plan.path}: wait_for_calm_s = {plan.wait_for_calm_s:g} is above {MOST_CALM_S:g}, an"
            " hour for each restart."
        )
    for level in plan.levels:
        requests = level.requests(len(plan.arms))
        if requests > MOST_REQUESTS:
            raise BadInput(
                f"{plan.path}: [level.{level.name}] sends {requests:,} requests in a restart, above"
                f" {MOST_REQUESTS:,}; give it fewer tuples, or fewer and shorter slices."
            )
    names = [arm.name for arm in plan.arms]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{plan.path}: two arms are called {name!r}.")
    if not plan.judged_levels:
        raise BadInput(
            f"{plan.path}: there is no level that claims anything; give it a [level.unloaded]."
        )
    _check_arms(plan)
    _check_delay(plan)
    if plan.indices("control") and not any(level.kind == "unloaded" for level in plan.levels):
        raise BadInput(
            f"{plan.path}: arm {plan.arms[plan.indices('control')[0]].name!r} is a control of the"
            " level unloaded, which this plan has not."
        )
    for level in plan.levels:
        _check_claims(plan, level)
        _check_schedule_version(plan, level)
        _check_gains(plan, level)
    for level in plan.levels:
        _check_adjusted(plan, level, is_template)


def _check_size(plan: Plan, level: Level) -> None:
    if level.kind == "repeat":
        return
    if not any(level.margins.values()):
        raise BadInput(f"{plan.path}: [level.{level.name}] claims nothing; give it margins.")
    if level.kind != "switchback":
        return
    fewest = FEWEST_IN_SLICES[level.percent]
    if level.slice_requests < FEWEST_IN_SLICE:
        raise BadInput(
            f"{plan.path}: slice_requests = {level.slice_requests} of [level.{level.name}] is below"
            f" {FEWEST_IN_SLICE}, the fewest in a slice."
        )
    if level.slice_requests * level.sets < fewest:
        raise BadInput(
            f"{plan.path}: slice_requests × sets = {level.slice_requests * level.sets} of"
            f" [level.{level.name}] is below {fewest}, the fewest of an arm at that load."
        )


def _check_gains(plan: Plan, level: Level) -> None:
    """Raise BadInput if a gain widens a margin by more than is allowed."""
    for metric, gains in level.gains.items():
        for statistic, gain in gains.items():
            most = MOST_GAIN[plan.schedule_version][level.percent]
            if gain > most:
                raise BadInput(
                    f"{plan.path}: gains.{metric}.{statistic} = {gain} is above {most}, the most"
                    f" that may widen a margin at {level.percent} %."
                )


def _check_schedule_version(plan: Plan, level: Level) -> None:
    """Raise BadInput if a level uses what the plan's schedule does not have."""
    newer = [key for key in ("rate_per_s", "betas") if getattr(level, key)]
    newer += [metric for metric in (ADJUSTED, DILATION) if metric in level.margins]
    if newer and plan.schedule_version == 1:
        raise BadInput(
            f"{plan.path}: {newer[0]} of [level.{level.name}] needs schedule_version = 2 at the top"
            " of the plan."
        )


def _check_adjusted(plan: Plan, level: Level, is_template: bool) -> None:
    """Raise BadInput if an adjusted time is claimed without β, or without what sees waiting."""
    for statistic, margin in level.margins.get(ADJUSTED, {}).items():
        if not is_template and statistic not in level.betas.get(ADJUSTED, {}):
            raise BadInput(
                f"{plan.path}: [level.{level.name}] claims {ADJUSTED} {statistic} without"
                f" betas.{ADJUSTED}.{statistic}; `drbert-prove plan` takes it from a pilot."
            )
        companions = [level.margins.get(DILATION, {}).get("mean", math.inf)]
        companions += [
            other.margins.get("inference", {}).get("mean", math.inf)
            for other in plan.levels
            if other.kind == "mixed"
        ]
        if min(companions) > margin:
            raise BadInput(
                f"{plan.path}: [level.{level.name}] claims {ADJUSTED} {statistic}, which hides a"
                f" candidate that waits; with a margin of at most {margin:g}, claim {DILATION} mean"
                " there or inference mean at a level mixed too."
            )


def _check_claims(plan: Plan, level: Level) -> None:
    """Raise BadInput if a claim cannot be measured, or says too little by itself."""
    claimed = [metric for metric in FROM_SERVER if metric in level.margins]
    if claimed and not plan.server_timing:
        raise BadInput(
            f"{plan.path}: [level.{level.name}] claims {claimed[0].replace('_', ' ')} time,"
            " which only the dialect drbert reports."
        )
    if list(level.margins) == ["inference_cpu"]:
        raise BadInput(
            f"{plan.path}: [level.{level.name}] claims inference_cpu alone, which does not see"
            " a candidate that waits; claim a time of the wall clock too."
        )
    if set(level.margins) == {DILATION}:
        raise BadInput(
            f"{plan.path}: [level.{level.name}] claims {DILATION} alone, which is no time;"
            f" claim {ADJUSTED} or another time too."
        )


def _check_arms(plan: Plan) -> None:
    copied_roles: tuple[Role, ...] = ("reference", "candidate")
    for role in copied_roles:
        _check_pair(plan, role)
    copies = [arm for arm in plan.arms if arm.role != "delayed"]
    for arm in copies:
        _check_arm(plan.path, arm)
    if len({arm.artifact is None for arm in copies}) > 1:
        raise BadInput(
            f"{plan.path}: some arms name an artifact and some none; either the run starts all of"
            " them or none."
        )
    if plan.instances:
        _check_instances(plan, copies)


def _check_pair(plan: Plan, role: Role) -> None:
    """Raise BadInput unless two arms have the role, and both load the same model.

    Their artifacts may be copies of one folder; the run compares them.
    """
    arms = [plan.arms[i] for i in plan.indices(role)]
    if len(arms) != 2:
        raise BadInput(f"{plan.path}: {len(arms)} arms are {role}; each is loaded twice.")
    if len({(arm.model, arm.dialect) for arm in arms}) > 1:
        raise BadInput(
            f"{plan.path}: the two arms that are {role} name different models or dialects; they are"
            " two loads of one."
        )


def _check_arm(path: Path, arm: Arm) -> None:
    """Raise BadInput unless the arm names what to start or to call, and how it is called."""
    if arm.artifact is None and arm.url is None:
        raise BadInput(f"{path}: arm {arm.name!r} needs an artifact to start or a url to call.")
    if arm.artifact and arm.model:
        raise BadInput(
            f"{path}: arm {arm.name!r} names both a model and an artifact; what a run"
            " starts is requested by the arm's name, so leave the model out."
        )
    if "{model}" in DIALECTS[arm.dialect].path and not arm.model:
        raise BadInput(f"{path}: arm {arm.name!r} speaks {arm.dialect}, whose path needs a model.")
    if arm.url is None and arm.dialect != "drbert":
        raise BadInput(
            f"{path}: arm {arm.name!r} speaks {arm.dialect}; the server that a run starts"
            " speaks drbert."
        )


def _check_instances(plan: Plan, copies: list[Arm]) -> None:
    """Raise BadInput unless every arm is a running server of ours that is called by http."""
    if plan.starts_servers:
        raise BadInput(
            f"{plan.path}: [server] takes instances that run already, and arm {copies[0].name!r}"
            " has an artifact to start; give the arms urls."
        )
    if plan.restart_command is not None:
        raise BadInput(
            f"{plan.path}: [server] names a restart command and takes instances in place of"
            " restarts; leave one of them out."
        )
    for arm in copies:
        if arm.dialect != "drbert":
            raise BadInput(
                f"{plan.path}: arm {arm.name!r} speaks {arm.dialect}; instances are identified by"
                " X-Instance-Id, which only drbert sends."
            )
        if urlsplit(arm.url or "").scheme != "http":
            raise BadInput(
                f"{plan.path}: arm {arm.name!r} is at {arm.url}; instances are called by their"
                " addresses, which needs http."
            )


def _check_delay(plan: Plan) -> None:
    """Raise BadInput unless one delayed arm can show that a regression would be detected."""
    delayed = [plan.arms[i] for i in plan.indices("delayed")]
    if len(delayed) != 1:
        raise BadInput(
            f"{plan.path}: {len(delayed)} arms are delayed; a plan has one, the second"
            " reference slowed down, to show that a regression would be detected."
        )
    [arm] = delayed
    if arm.artifact or arm.url or arm.model:
        raise BadInput(
            f"{plan.path}: the delayed arm {arm.name!r} is no copy of its own; it takes neither"
            " artifact, url nor model."
        )
    if arm.by == "client" and any(level.kind != "unloaded" for level in plan.judged_levels):
        raise BadInput(
            f"{plan.path}: a client's delay loads no queue, so it is a control at the level"
            " unloaded only."
        )
    if arm.by == "server" and not plan.server_timing:
        raise BadInput(
            f'{plan.path}: servers of another dialect cannot delay; set by = "client" for the arm'
            f" {arm.name!r}."
        )
    for level in plan.judged_levels:
        if level.tightest_margin >= plan.delay:
            raise BadInput(
                f"{plan.path}: the delay is {plan.delay:.1%}, three times the tightest margin of"
                f" all levels, and would not be detected at [level.{level.name}], whose tightest is"
                f" {level.tightest_margin:.1%}; claim them in plans of their own."
            )
        if level.tuples and level.tuples < 32:
            raise BadInput(
                f"{plan.path}: tuples = {level.tuples} of [level.{level.name}] is fewer than 32,"
                " and a control block of 8 is a quarter of them."
            )
