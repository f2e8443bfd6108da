"""Low-rank factorisation: one paper, one file."""
