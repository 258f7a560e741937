"""Text: sources, cleaning, and the tokenizer."""
