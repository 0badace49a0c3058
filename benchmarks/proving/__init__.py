"""Benchmarks of the proof itself: does its judge err as rarely as it claims?"""
