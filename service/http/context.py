"""
What the HTTP endpoints of a process share.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.http.keys import Keys
from service.http.metrics_page import MetricsPage
from service.http.transport.bodies import LargeBodies
from service.http.transport.pacing import Pacer
from service.http.transport.request import ByteBudget
from service.schemas import Limits
from service.settings import Settings
from service.shadow import Shadow
from service.state import ServiceState
from service.telemetry.tracing import Tracing


@dataclass(frozen=True)
class RequestHooks:
    """What is done around every classification, where it is configured."""

    keys: Keys | None = None
    shadow: Shadow | None = None
    tracing: Tracing | None = None


class HttpContext:
    """The service as its HTTP endpoints see it, and the budgets that their requests share."""

    def __init__(self, service: ServiceState, hooks: RequestHooks | None = None) -> None:
        settings = service.settings
        self.service = service
        self.hooks = hooks or RequestHooks()
        self.limits = request_limits(settings)
        self.body_budget = ByteBudget(settings.max_inflight_body_bytes)
        self.large_bodies = LargeBodies(settings.max_body_bytes)
        self.refusal_pacer = Pacer()
        """Paces refusals of bodies, so that a client in a tight loop delays no other."""
        self.metrics_page = MetricsPage(service.metrics, service.executors.metrics)


def request_limits(settings: Settings) -> Limits:
    """Return what a request may hold under these settings."""
    return Limits(
        texts=settings.max_texts,
        text_chars=settings.max_text_chars,
        windows=settings.max_windows,
        tokens=settings.max_request_tokens,
        items=settings.max_queue_size,
        # As many as texts without labels could have.
        pair_chars=settings.max_body_bytes,
    )
