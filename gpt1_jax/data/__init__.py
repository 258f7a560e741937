"""Documents to sharded, checksummed tokens to global batches."""
