"""Turns a fine-tuned checkpoint into an artifact: drops the decoder, compiles, verifies, seals."""
