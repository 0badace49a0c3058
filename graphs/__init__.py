"""Reduce compiled models to canonical graphs, without names and without weights."""
