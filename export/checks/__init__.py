"""Checks: compares variants with transformers' answers, and decides their accuracy gates."""
