"""Weights as small integers: one paper, one file."""
