"""
Pacing: answers that cost little and may be requested in a tight loop are sent one at a time.

Sixty-four clients in a tight loop would keep the event loop busy with 64 requests a round, and
every other request needs several rounds.
"""

from __future__ import annotations

import asyncio

# At most 500 such answers a second.
PAUSE_S = 0.002
# A waiting caller holds memory, such as a refused body. More callers than this do not wait.
MAX_WAITING = 128


class Pacer:
    """Lets callers continue one after the other, PAUSE_S apart."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def wait(self) -> None:
        """Return when it is the caller's turn, or at once if too many callers wait."""
        if self._waiting >= MAX_WAITING:
            return
        self._waiting += 1
        try:
            async with self._turn:
                await asyncio.sleep(PAUSE_S)
        finally:
            self._waiting -= 1
