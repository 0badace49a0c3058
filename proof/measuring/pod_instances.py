"""
Takes running servers one by one, where a run cannot restart them: pods of a cluster.

The name in an arm's `url` stands for many servers, told apart by their X-Instance-Id. Each restart
of the plan takes, for every arm, one that counted in no restart before: what a fresh start is
elsewhere, a further pod is here.
"""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from tqdm import tqdm

from command import BadInput, Unavailable
from proof.plans.dialects import headers_from
from proof.plans.plan import Arm, Plan

# Pods that were just asked for have images to fetch and models to load.
THERE_WITHIN_S = 1800.0
LOOK_EVERY_S = 2.0


@dataclass(frozen=True)
class Instance:
    """One server behind a name."""

    address: str
    info: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.info["instance_id"])


def take(
    plan: Plan, order: list[int], counted: Collection[str], tried: Collection[str]
) -> dict[str, Instance]:
    """A server for each arm, by its name: none of those that `counted`, those that were `tried` in
    vain last.

    Unavailable if there are not enough, BadInput if one is not what the plan needs.
    """
    taken: dict[str, Instance] = {}
    for url, arms in _by_url(plan, order).items():
        fresh = _wait_for(url, arms, counted, len(arms))
        fresh.sort(key=lambda instance: (instance.id in tried, instance.address))
        taken |= {arm.name: instance for arm, instance in zip(arms, fresh, strict=False)}
    _check(plan, taken)
    return taken


def check_enough(plan: Plan) -> None:
    """Unavailable, before anything is measured, if all restarts together need more servers than
    there are.
    """
    for url, arms in _by_url(plan, plan.claimed_arms).items():
        _wait_for(url, arms, (), plan.restarts * len(arms))


def told(taken: Mapping[str, Instance], plan: Plan) -> dict[str, Any]:
    """What the servers say of themselves, as one server's /info would: each arm's model under the
    arm's name.
    """
    first = next(iter(taken.values())).info
    models = {
        arm.name: taken[arm.name].info["models"][_model(arm, taken[arm.name])]
        for arm in plan.arms
        if arm.name in taken
    }
    return {**first, "models": models}


def addresses(url: str) -> list[str]:
    """Every address that the name in a url stands for, as urls; none while the name is not
    known.
    """
    parts = urlsplit(url)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return []
    urls = set()
    for family, _, _, _, where in found:
        host, port = cast("tuple[str, int]", where[:2])
        urls.add(
            f"http://[{host}]:{port}" if family == socket.AF_INET6 else f"http://{host}:{port}"
        )
    return sorted(urls)


def _wait_for(url: str, arms: list[Arm], counted: Collection[str], wanted: int) -> list[Instance]:
    give_up, said = time.monotonic() + THERE_WITHIN_S, -1
    while True:
        fresh = [instance for instance in _behind(url, arms[0]) if instance.id not in counted]
        if len(fresh) >= wanted:
            return fresh
        if len(fresh) != said:
            said = len(fresh)
            tqdm.write(f"{url}: {said} of the {wanted} servers that are needed answer")
        if time.monotonic() > give_up:
            raise Unavailable(
                f"Behind {url} are {len(fresh)} servers that answer and have not been measured, and"
                f" {wanted} are needed: each restart takes one for every arm. Give it more"
                " replicas, or the plan fewer restarts."
            )
        time.sleep(LOOK_EVERY_S)


def _behind(url: str, arm: Arm) -> list[Instance]:
    """The servers that answer behind a name, a server once however many addresses it has."""
    found: dict[str, Instance] = {}
    for address in addresses(url):
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{address}/info", headers=headers_from(arm.headers_env)),
                timeout=10,
            ) as response:
                info = json.load(response)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403):
                raise BadInput(
                    f"{address} answers with {error.code}: it wants a key. Give arm {arm.name}"
                    " headers_env, a variable that holds one."
                ) from None
            continue
        except (OSError, ValueError):
            continue
        if isinstance(info, dict) and "instance_id" in info and info.get("models"):
            found.setdefault(str(info["instance_id"]), Instance(address, info))
    return list(found.values())


def _by_url(plan: Plan, order: list[int]) -> dict[str, list[Arm]]:
    """Arms with a server of their own, in the order given, by where they are asked for."""
    groups: dict[str, list[Arm]] = {}
    for arm in (plan.arms[i] for i in order):
        if arm.url:
            groups.setdefault(arm.url, []).append(arm)
    return groups


def _check(plan: Plan, taken: Mapping[str, Instance]) -> None:
    for name, instance in taken.items():
        arm = next(arm for arm in plan.arms if arm.name == name)
        if _model(arm, instance) not in instance.info["models"]:
            raise BadInput(
                f"{plan.path}: arm {name} asks for the model {arm.model!r}; {instance.address} has"
                f" {', '.join(instance.info['models'])}."
            )
    slowed = taken[plan.arms[plan.indices("reference")[1]].name]
    by_server = any(plan.arms[i].by == "server" for i in plan.indices("delayed"))
    if by_server and slowed.info.get("settings", {}).get("busy_wait") != "anywhere":
        raise BadInput(
            f"{slowed.address} does not slow down on request, so no control could be seen; start it"
            ' with DRBERT_BUSY_WAIT=anywhere, or say by = "client" for the delayed arm.'
        )


def _model(arm: Arm, instance: Instance) -> str:
    return arm.model or str(next(iter(instance.info["models"])))
