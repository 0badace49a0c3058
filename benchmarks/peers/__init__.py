"""
Other ways to serve the same classifier, beside ours: `python -m benchmarks peers`, see compare.py.
"""

from benchmarks.peers.compare import CONNECTIONS, main, measure

__all__ = ["CONNECTIONS", "main", "measure"]
