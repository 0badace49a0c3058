"""Pretrains encoders with enhanced decoders, fine-tunes them and evaluates them."""

from command import report_missing_packages

report_missing_packages("training")
