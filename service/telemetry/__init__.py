"""
Telemetry: Prometheus metrics, OpenTelemetry spans, JSON logs, and readings of NVIDIA GPUs.

It counts what the other packages report, and knows neither HTTP nor models nor engines.
"""
