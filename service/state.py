"""
What one process of the service consists of, apart from its connections.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from command import installed_version
from service.artifact import Artifact
from service.batching.answer_cache import AnswerCache
from service.checkpoints.cache import CheckpointCache
from service.host.executors import Executors
from service.lifecycle import Lifecycle
from service.loading.engine import LoadOptions
from service.registry import LoadedModel, ModelRegistry
from service.settings import Settings
from service.telemetry import nvml
from service.telemetry.metrics import Metrics


class ServiceState:
    """Settings, metrics, threads, the models with their batcher, and the life cycle."""

    def __init__(
        self,
        artifacts: Mapping[str, Artifact],
        settings: Settings,
        variant: str = "auto",
        checkpoints: CheckpointCache | None = None,
    ) -> None:
        self.settings = settings
        self.checkpoints = checkpoints or CheckpointCache(settings.artifact_cache)
        """Opens the models that are loaded later."""
        self.instance_id = uuid.uuid4().hex
        self.started = int(time.time())
        """Seconds since 1970."""
        self.version = installed_version()
        self.executors = Executors(settings.max_queue_size)
        self.metrics = Metrics(
            CollectorRegistry(),
            readings=nvml.readings,
            waiting=lambda: self.batcher.waiting,
            answering=lambda: self.lifecycle.active_requests,
            waiting_s=lambda: self.batcher.queue_s,
            cache_bytes=lambda: 0 if self.answer_cache is None else self.answer_cache.bytes,
        )
        options = LoadOptions.from_settings(settings, variant)
        self.threads = options.threads
        self.registry = ModelRegistry(settings, options, self.metrics)
        self.batcher = self.registry.batcher
        self.answer_cache = (
            None
            if settings.cache_mib is None
            else AnswerCache(self.batcher, settings.cache_mib * 2**20, self.metrics.count_cached)
        )
        """None unless it is switched on."""
        self.lifecycle = Lifecycle(self.registry, artifacts, settings, self.metrics)

    def acquire(self, name: str | None) -> LoadedModel:
        """Return a model for a `with` block, the default one for None.

        Raises NotReady or ShuttingDown while no requests are answered, UnknownModel.
        """
        self.lifecycle.check_accepting()
        return self.registry.acquire(name)
