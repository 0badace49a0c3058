"""
Orders in which every arm stands at every place, and follows every other, equally often.
"""

from __future__ import annotations

import random


def williams(size: int) -> list[list[int]]:
    """A Williams design: a Latin square in which, for an even size, every ordered pair of neighbours occurs once.

    For an odd size the square and its mirror together have that property, so both are returned.
    E. J. Williams, Australian Journal of Scientific Research 2 (1949).
    """
    first = _zigzag(size)
    square = [[(value + shift) % size for value in first] for shift in range(size)]
    return square if size % 2 == 0 else square + [row[::-1] for row in square]


def _zigzag(size: int) -> list[int]:
    """0, 1, size-1, 2, size-2, …: neighbours differ by every amount once."""
    low, high, order = 1, size - 1, [0]
    while len(order) < size:
        order.append(low)
        low += 1
        if len(order) < size:
            order.append(high)
            high -= 1
    return order


def balanced_orders(size: int, rng: random.Random) -> list[list[int]]:
    """A Williams design with rows and labels shuffled."""
    rows, labels = williams(size), list(range(size))
    rng.shuffle(rows)
    rng.shuffle(labels)
    return [[labels[value] for value in row] for row in rows]
