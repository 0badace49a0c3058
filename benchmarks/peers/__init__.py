"""
Other ways to serve the same classifier, beside ours: `python -m benchmarks peers`, see compare.py.
"""

from benchmarks.peers.compare import main, measure

__all__ = ["main", "measure"]
