"""
Watch whether a GPU of the servers is slowed down while a restart is measured.

As with a throttled processor, that is not the model's doing. The service reports it at /metrics as
drbert_gpu_slowed{reason} (NVML's clock event reasons). Servers without a GPU and servers of other
projects report nothing.
"""

from __future__ import annotations

import contextlib
import re
import threading
import urllib.request
from collections.abc import Collection, Iterator

EVERY_S = 5.0
"""Seconds between two looks at the servers."""
_SLOWED = re.compile(r'^drbert_gpu_slowed\{(?:.*,)?reason="(\w+)".*\} 1(?:\.0)?$', re.M)


@contextlib.contextmanager
def watch_throttling(urls: Collection[str], reasons: set[str]) -> Iterator[None]:
    """Add to `reasons` why any of the servers' GPUs is slowed down during the block.

    The servers are read at its begin, every EVERY_S seconds, and at its end.
    """
    if not urls:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while True:
            for url in urls:
                reasons.update(read_reasons(url))
            if ended.wait(EVERY_S):
                return

    reasons.update(*map(read_reasons, urls))
    watcher = threading.Thread(target=watch, name="gpu-throttling", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        reasons.update(*map(read_reasons, urls))


def read_reasons(url: str) -> set[str]:
    """Return why a server's GPUs are slowed down just now; nothing where it does not report it."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
            return set(_SLOWED.findall(response.read().decode()))
    except (OSError, ValueError):
        return set()
