"""
Turns: answers that cost little, and are asked for without end, are given one at a time and a pause
apart.

Sixty-four callers who do nothing but ask keep the event loop busy with as many requests a round,
and everybody else's request needs several rounds.
"""

from __future__ import annotations

import asyncio

# At most 500 such answers a second.
PAUSE_S = 0.002
# Who waits holds memory, as a refused body's: beyond so many nobody is held up.
MOST_WAITING = 128


class Turns:
    """Lets callers go on one after the other, PAUSE_S apart."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def wait(self) -> None:
        """Return when it is the caller's turn, or at once if too many wait already."""
        if self._waiting >= MOST_WAITING:
            return
        self._waiting += 1
        try:
            async with self._turn:
                await asyncio.sleep(PAUSE_S)
        finally:
            self._waiting -= 1
