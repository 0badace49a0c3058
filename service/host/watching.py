"""
Repeated reads of files that are replaced while the service runs.

Each file has a thread of its own, because a read from a mount that hangs never returns. It must
block neither the event loop nor a shared pool.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


def watch(name: str, look: Callable[[], None], every_s: float = LOOK_EVERY_S) -> threading.Thread:
    """Call `look` every `every_s` seconds in a new daemon thread, and return the thread."""

    def run() -> None:
        while True:
            time.sleep(every_s)
            try:
                look()
            except Exception:  # A bug in one call must not prevent all later ones.
                log.exception("bug", extra={"thread": name})

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
