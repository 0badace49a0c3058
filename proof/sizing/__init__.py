"""Sizing: how many restarts and requests a claim needs, from a pilot run on the same machine."""
