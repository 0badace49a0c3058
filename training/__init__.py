"""Pretrains encoders with enhanced decoders, fine-tunes them and evaluates them."""
