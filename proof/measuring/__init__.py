"""
Measuring: starts servers, sends the plan's requests by Locust, and keeps what was measured.

The only part of the proof that starts processes.
"""
