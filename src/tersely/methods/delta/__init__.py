"""Differences of a fine-tuned model to its base, made small: one paper, one file."""
