"""Checks: a variant against transformers' answers, and the accuracy gate of reduced variants."""
