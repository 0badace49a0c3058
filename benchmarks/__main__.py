"""
Runs a benchmark by its name: see benchmarks/commands.py.

Apart, so that a package that is not installed ends with its exit code like everything else.
"""

from __future__ import annotations

from command import finish

if __name__ == "__main__":
    finish("benchmarks.commands:main")
