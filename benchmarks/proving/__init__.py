"""Benchmarks of the proof itself: whether the judge errs as rarely as it says."""
