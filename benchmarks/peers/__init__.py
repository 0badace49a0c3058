"""
Comparison with other servers of the same classifier: `python -m benchmarks peers`, see compare.py.
"""

from benchmarks.peers.compare import CONNECTIONS, main, measure

__all__ = ["CONNECTIONS", "main", "measure"]
