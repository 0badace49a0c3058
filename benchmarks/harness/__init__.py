"""The harness that all benchmarks share: servers, load generators, models, tables and pages."""
