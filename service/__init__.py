"""Answers POST /classify: needs neither torch nor transformers."""
