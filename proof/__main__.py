"""
Entry point of `drbert-prove` and `python -m proof`; proof/commands.py has the commands.

They are imported later, so that a package that is not installed ends with its own exit code.
"""

from __future__ import annotations

from command import finish


def run() -> None:
    """Run the console script `drbert-prove`."""
    finish("proof.commands:main")


if __name__ == "__main__":
    run()
