"""Benchmarks of single batches: the graphs that the engines run, without a server."""
