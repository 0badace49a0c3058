"""
Measuring: start servers, send the plan's requests with Locust, and record what was measured.

The only part of the proof that starts processes.
"""
