"""
Proves that a model swap adds no latency, or that it does: see proof/commands.py.

Apart, so that a package that is not installed ends with its exit code like everything else.
"""

from __future__ import annotations

from command import finish


def run() -> None:
    """The console script drbert-prove."""
    finish("proof.commands:main")


if __name__ == "__main__":
    run()
