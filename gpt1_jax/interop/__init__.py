"""Weights, tokenizers and programs for other software, and theirs for us."""
