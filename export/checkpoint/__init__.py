"""
Checkpoints: a Hugging Face folder read, checked and built, and what transformers answers for it.

It does not know graphs or artifacts' variants.
"""
