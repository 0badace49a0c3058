"""The harness: servers, load generators, models and tables that the benchmarks share."""
