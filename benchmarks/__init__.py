"""Benchmarks: one module for each question, on a shared harness.

    harness  servers, load generators, models and tables
    proving  whether the proof's judge errs as rarely as it says
    peers    other servers of the same classifier
    gpu      everything on an NVIDIA GPU

Numbers from here are measurements, not proofs.
"""
