"""The transformer and its objective."""
