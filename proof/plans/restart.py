"""
The document that `proof` hands to the load generator: which restart of which plan to send.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from command import BadUsage
from proof.plans.plan import Kind, Plan, measuring_busy_share, measuring_capacity
from proof.plans.plan_file import read_plan

VARIABLE = "DRBERT_RESTART"
"""The environment variable that holds a RestartSpec as JSON."""


def is_given() -> bool:
    """Return whether the environment names a restart or a plan to send."""
    return VARIABLE in os.environ or bool(os.environ.get("PLAN"))


class RestartSpec(BaseModel):
    """One restart to send: everything the load generator needs beyond the plan's own file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: Path
    """The plan's TOML file."""
    texts: Path | None = None
    """File of the texts to send, one on each line; the plan's own file if None."""
    restart: int = 0
    """Number of this start of the servers in the run, dropped ones included."""
    slot: int = 0
    """Number of restarts that counted before: the schedule depends on it."""
    run: str | None = None
    """The run's name, written into every row; it ends with the plan's digest."""
    rows: Path | None = None
    """The CSV file that gets a row for each request; a new file in evidence/looks if None."""
    facts: Path | None = None
    """The JSON file that gets facts about the generator itself, if any."""
    addresses: Mapping[str, str] = {}
    """URL by arm, where the plan's URLs name many servers and the run chose one for each arm."""
    probe_kind: Kind | None = None
    """Kind of level that measures busy shares instead of sending the plan's levels."""
    probe_rates_per_s: tuple[float, ...] = ()
    """Arrival rates at which it measures them."""
    capacity_s: float | None = None
    """Seconds of a closed loop per arm: measures capacity instead of sending the plan's levels.
    With `probe_kind`, seconds for each rate.
    """
    complaint_fd: int | None = None
    """File descriptor of a pipe for the message of a fatal error: a full disk takes no log."""

    def to_environment(self) -> dict[str, str]:
        """Return the environment variable that hands this document over."""
        return {VARIABLE: self.model_dump_json()}

    @classmethod
    def from_environment(cls) -> RestartSpec | None:
        """Return the document of VARIABLE, or of PLAN alone; None if neither is set.

        Raise BadUsage if VARIABLE holds anything else.
        """
        document = os.environ.get(VARIABLE)
        if document is not None:
            try:
                return cls.model_validate_json(document)
            except ValidationError as error:
                raise BadUsage(f"{VARIABLE} is not the JSON of a restart: {error}") from None
        plan = os.environ.get("PLAN")
        return cls(plan=Path(plan)) if plan else None

    def read_plan(self) -> Plan:
        """Return the plan to send: with these texts, or as a measurement of capacity or load."""
        plan = read_plan(self.plan, is_template=self.capacity_s is not None)
        if self.texts is not None:
            plan = dataclasses.replace(plan, texts=self.texts)
        if self.capacity_s is None:
            return plan
        if self.probe_kind is not None:
            return measuring_busy_share(
                plan, self.probe_kind, self.probe_rates_per_s, self.capacity_s
            )
        return measuring_capacity(plan, self.capacity_s)
