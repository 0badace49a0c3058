"""
Run a benchmark by its name; benchmarks/commands.py lists them.

It is a module of its own so that a missing package ends with the exit code of every other command.
"""

from __future__ import annotations

from command import finish

if __name__ == "__main__":
    finish("benchmarks.commands:main")
