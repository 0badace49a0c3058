"""
Telemetry: Prometheus metrics, OpenTelemetry spans, JSON logs, and readings of NVIDIA GPUs.

It counts what it is given. It does not know HTTP, models or engines.
"""
