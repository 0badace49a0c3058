"""
How requests are best shared out among many pods: `python -m benchmarks fleet`, see commands.py.
"""

from benchmarks.fleet.commands import main

__all__ = ["main"]
