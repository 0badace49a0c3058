"""Measures that are no proof by themselves: whether the judges judge rightly, and what they are
told.
"""
