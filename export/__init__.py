"""Export: turns a fine-tuned checkpoint into a verified artifact without its decoder."""
