"""
Watches whether a GPU of the servers is slowed down while a restart is measured: like a throttled
processor, that is not the model's doing.

The service tells it at /metrics, as drbert_gpu_slowed{reason} (NVML's clock event reasons). Servers
without a GPU, and those that are not ours, tell nothing.
"""

from __future__ import annotations

import contextlib
import re
import threading
import urllib.request
from collections.abc import Collection, Iterator

EVERY_S = 5.0
_SLOWED = re.compile(r'^drbert_gpu_slowed\{(?:.*,)?reason="(\w+)".*\} 1(?:\.0)?$', re.M)


@contextlib.contextmanager
def watch_throttling(urls: Collection[str], seen: set[str]) -> Iterator[None]:
    """Puts the reasons that any of the servers tells into `seen`: at the beginning, every EVERY_S
    seconds, and at the end.
    """
    if not urls:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while True:
            for url in urls:
                seen.update(reasons(url))
            if over.wait(EVERY_S):
                return

    seen.update(*map(reasons, urls))
    watching = threading.Thread(target=watch, name="slowdowns", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        seen.update(*map(reasons, urls))


def reasons(url: str) -> set[str]:
    """Why the GPUs of that server are slowed down just now; nothing where it does not say."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
            return set(_SLOWED.findall(response.read().decode()))
    except (OSError, ValueError):
        return set()
