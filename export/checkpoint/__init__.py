"""
Checkpoints: reads, checks and builds a Hugging Face model, and asks transformers for its answers.

This package knows neither graphs nor variants.
"""
