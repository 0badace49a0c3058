"""
The life cycle of one replica: loading, ready, draining, and whether its engine still answers.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping

from service.artifact import Artifact
from service.errors import NotReady, ShuttingDown
from service.registry import ModelRegistry
from service.settings import Settings
from service.telemetry.metrics import Metrics

DRAINING = "This replica is draining; another one answers."


class Lifecycle:
    """The state of a replica, and the checks that every request passes."""

    def __init__(
        self,
        registry: ModelRegistry,
        artifacts: Mapping[str, Artifact],
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.state = "loading"
        """`loading`, `ready` or `draining`."""
        self.is_stalled = False
        """Whether the engine has had a batch for longer than it is allowed."""
        self.active_requests = 0
        """Requests that are being answered."""
        self._registry = registry
        self._artifacts = artifacts
        self._settings = settings
        self._metrics = metrics
        self._refuses = False
        self._stopping = threading.Event()

    def load(self) -> None:
        """Load and warm up every model in order, then accept requests.

        Returns early, between two models, once the replica drains.
        """
        self._registry.default = next(iter(self._artifacts), "")
        for name, artifact in self._artifacts.items():
            if self._stopping.is_set():
                return
            self._registry.add(name, artifact, stopping=self._stopping.is_set)
        if self._stopping.is_set():
            return
        self._registry.batcher.start()
        self.state = "ready"
        self._metrics.ready.set(1)

    def start_draining(self) -> None:
        """Stop being ready, so that clients go elsewhere.

        Requests that still arrive are answered until `drain`.
        """
        self.state = "draining"
        self._stopping.set()
        self._metrics.ready.set(0)

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Refuse new requests, finish the accepted ones, and return whether that was in time."""
        self.start_draining()
        self._refuses = True
        return await self._registry.batcher.close(
            self._settings.drain_timeout_s if timeout_s is None else timeout_s
        )

    async def wait_until_idle(self, timeout_s: float) -> None:
        """Wait until no request is being answered, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.active_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.005)

    def check_ready(self) -> None:
        """Raise NotReady or ShuttingDown unless clients should send requests to this replica."""
        if self.state == "draining":
            raise ShuttingDown(DRAINING)
        self.check_accepting()

    def check_accepting(self) -> None:
        """Raise NotReady or ShuttingDown unless this replica answers requests.

        It still does for a while after it stopped being ready.
        """
        loaded, batcher = self._registry.loaded, self._registry.batcher
        if self._refuses:
            raise ShuttingDown(DRAINING)
        if self.state == "loading" or not loaded:
            raise NotReady(
                f"Loading: {len(loaded)} of {len(self._artifacts)} models are ready.",
                retry_after_s=1,
            )
        if not batcher.is_alive:
            raise NotReady("The thread that runs the models has ended; restart this replica.")
        if self.is_stalled:
            raise NotReady("A batch has not come back from the engine; this replica will end.")

    def check_not_saturated(self) -> None:
        """Raise NotReady if the queue has been full for longer than `saturated_after_s`."""
        limit_s = self._settings.saturated_after_s
        full_for_s = self._registry.batcher.queue.full_for_s
        if limit_s is not None and full_for_s > limit_s:
            raise NotReady(f"The queue has been full for {full_for_s:.0f} s.", retry_after_s=1)

    def set_stalled(self, is_stalled: bool) -> None:
        """Note whether the engine has had a batch for too long; no requests are accepted then."""
        self.is_stalled = is_stalled
        self._metrics.ready.set(self.state == "ready" and not is_stalled)
