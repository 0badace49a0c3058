"""
Orders in which every arm has each position, and follows every other arm, equally often.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Orders = npt.NDArray[np.int64]


def williams(size: int) -> list[list[int]]:
    """Return a Williams design: a Latin square that also balances which arm follows which.

    For an even size every ordered pair of neighbours occurs once. For an odd size the square and
    its mirror together have that property, so both are returned.

    E. J. Williams, Australian Journal of Scientific Research 2 (1949).
    """
    first = _zigzag(size)
    square = [[(value + shift) % size for value in first] for shift in range(size)]
    return square if size % 2 == 0 else square + [row[::-1] for row in square]


def _zigzag(size: int) -> list[int]:
    """Return 0, 1, size-1, 2, size-2, …: each difference between neighbours occurs once."""
    low, high, order = 1, size - 1, [0]
    while len(order) < size:
        order.append(low)
        low += 1
        if len(order) < size:
            order.append(high)
            high -= 1
    return order


def balanced_orders(size: int, count: int, rng: np.random.RandomState) -> Orders:
    """Return at least `count` orders of 0…size-1, as (rows, size).

    They are whole Williams designs, one after the other, each with shuffled rows and labels.
    """
    square = np.array(williams(size))
    sets = max(1, -(-count // len(square)))
    rows = shuffles(len(square), sets, rng)
    labels = shuffles(size, sets, rng)
    orders: Orders = labels[np.arange(sets)[:, None, None], square[rows]].reshape(-1, size)
    return orders


def shuffles(size: int, count: int, rng: np.random.RandomState) -> Orders:
    """Return (count, size) permutations of 0…size-1.

    They are the ranks of uniform numbers: NumPy may change how `shuffle` draws, but not these.
    """
    order: Orders = np.argsort(rng.random_sample((count, size)), axis=1, kind="stable")
    return order
