"""
Looks again at files that are replaced while the service runs, in threads of their own.

Not on the event loop, nor in a pool that others need: a file on a mount that hangs is waited for
without end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


def watch(name: str, look: Callable[[], None], every_s: float = LOOK_EVERY_S) -> threading.Thread:
    """Call `look` in a new thread after every `every_s` seconds, until the process ends. The thread
    holds no process up.
    """

    def run() -> None:
        while True:
            time.sleep(every_s)
            try:
                look()
            except Exception:  # A bug in one look must not end all later ones.
                log.exception("bug", extra={"thread": name})

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
