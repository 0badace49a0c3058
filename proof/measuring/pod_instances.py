"""
Take running servers one by one, where a run cannot restart them: pods of a cluster.

The host in an arm's `url` stands for many servers, which X-Instance-Id identifies. Each restart of
the plan takes for every arm a server that counted in no restart before. A new pod is to a cluster
what a fresh start is elsewhere.
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

AVAILABLE_WITHIN_S = 1800.0
"""Longest wait for servers: new pods have images to fetch and models to load."""
POLL_S = 2.0
"""Seconds between two looks for servers."""


@dataclass(frozen=True)
class Instance:
    """One server behind a host name."""

    address: str
    """Its URL, with an IP address."""
    info: Mapping[str, Any]
    """Its /info."""

    @property
    def id(self) -> str:
        """Its X-Instance-Id."""
        return str(self.info["instance_id"])


def take_instances(
    plan: Plan, order: list[int], counted: Collection[str], tried: Collection[str]
) -> dict[str, Instance]:
    """Return a server for each arm, by the arm's name.

    `counted` are ids of servers that are never taken again. `tried` are those that answered in
    dropped restarts; they are taken last. Raise Unavailable if there are not enough servers,
    BadInput if one is not what the plan needs.
    """
    instances: dict[str, Instance] = {}
    for url, arms in _arms_by_url(plan, order).items():
        fresh = _wait_for(url, arms, counted, len(arms))
        fresh.sort(key=lambda instance: (instance.id in tried, instance.address))
        instances |= {arm.name: instance for arm, instance in zip(arms, fresh, strict=False)}
    _check_instances(plan, instances)
    return instances


def check_enough(plan: Plan) -> None:
    """Raise Unavailable if all restarts together need more servers than there are."""
    for url, arms in _arms_by_url(plan, plan.claimed_arms).items():
        _wait_for(url, arms, (), plan.restarts * len(arms))


def merge_info(instances: Mapping[str, Instance], plan: Plan) -> dict[str, Any]:
    """Return the servers' /info as if one server had loaded each arm's model under its name."""
    first = next(iter(instances.values())).info
    models = {}
    for arm in plan.arms:
        if arm.name in instances:
            instance = instances[arm.name]
            models[arm.name] = instance.info["models"][_model_name(arm, instance)]
    return {**first, "models": models}


def resolve_addresses(url: str) -> list[str]:
    """Return a URL for each address of the host in `url`; none while it cannot be resolved."""
    parts = urlsplit(url)
    try:
        resolved = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return []
    urls = set()
    for family, _, _, _, address in resolved:
        host, port = cast("tuple[str, int]", address[:2])
        host = f"[{host}]" if family == socket.AF_INET6 else host
        urls.add(f"http://{host}:{port}")
    return sorted(urls)


def _wait_for(url: str, arms: list[Arm], counted: Collection[str], needed: int) -> list[Instance]:
    """Return the servers behind a URL that did not count yet, as soon as there are enough."""
    deadline = time.monotonic() + AVAILABLE_WITHIN_S
    printed = -1
    while True:
        fresh = [
            instance for instance in find_instances(url, arms[0]) if instance.id not in counted
        ]
        if len(fresh) >= needed:
            return fresh
        if len(fresh) != printed:
            printed = len(fresh)
            tqdm.write(f"{url}: {printed} of the {needed} servers that are needed answer")
        if time.monotonic() > deadline:
            raise Unavailable(
                f"Behind {url} are {len(fresh)} servers that answer and have not been measured, and"
                f" {needed} are needed: each restart takes one for every arm. Give it more"
                " replicas, or the plan fewer restarts."
            )
        time.sleep(POLL_S)


def find_instances(url: str, arm: Arm) -> list[Instance]:
    """Return the servers that answer behind a URL, each once however many addresses it has."""
    instances: dict[str, Instance] = {}
    for address in resolve_addresses(url):
        info = _read_info(address, arm)
        if isinstance(info, dict) and "instance_id" in info and info.get("models"):
            instances.setdefault(str(info["instance_id"]), Instance(address, info))
    return list(instances.values())


def _read_info(address: str, arm: Arm) -> Any:
    """Return a server's /info, or None; BadInput if it wants a key."""
    request = urllib.request.Request(f"{address}/info", headers=headers_from(arm.headers_env))
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise BadInput(
                f"{address} answers with {error.code}: it wants a key. Give arm {arm.name}"
                " headers_env, a variable that holds one."
            ) from None
        return None
    except (OSError, ValueError):
        return None


def _arms_by_url(plan: Plan, order: list[int]) -> dict[str, list[Arm]]:
    """Return the arms that have a URL, in the given order, by it."""
    groups: dict[str, list[Arm]] = {}
    for arm in (plan.arms[i] for i in order):
        if arm.url:
            groups.setdefault(arm.url, []).append(arm)
    return groups


def _check_instances(plan: Plan, instances: Mapping[str, Instance]) -> None:
    for arm in plan.arms:
        instance = instances.get(arm.name)
        if instance is not None and _model_name(arm, instance) not in instance.info["models"]:
            raise BadInput(
                f"{plan.path}: arm {arm.name} asks for the model {arm.model!r}; {instance.address}"
                f" has {', '.join(instance.info['models'])}."
            )
    slowed = instances[plan.arms[plan.indices("reference")[1]].name]
    by_server = any(plan.arms[i].by == "server" for i in plan.indices("delayed"))
    if by_server and slowed.info.get("settings", {}).get("busy_wait") != "anywhere":
        raise BadInput(
            f"{slowed.address} does not slow down on request, so no control could be detected;"
            ' start it with DRBERT_BUSY_WAIT=anywhere, or set by = "client" for the delayed arm.'
        )


def _model_name(arm: Arm, instance: Instance) -> str:
    return arm.model or str(next(iter(instance.info["models"])))
