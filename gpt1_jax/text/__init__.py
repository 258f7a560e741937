"""Text to clean documents to tokens."""
