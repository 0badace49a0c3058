"""Tests of the service under attack, overload and failure: `python -m tests.chaos`."""
