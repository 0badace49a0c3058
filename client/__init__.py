"""Classify texts from the command line, by a running service."""
