"""Classifies texts from the shell, by a running service: see __main__.py."""
