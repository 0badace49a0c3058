"""
Runs the client: see client/classify.py.

Apart, so that a package that is not installed ends with its exit code like everything else.
"""

from __future__ import annotations

from command import finish


def run() -> None:
    """The console script drbert-classify."""
    finish("client.classify:main")


if __name__ == "__main__":
    run()
