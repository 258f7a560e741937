"""What a trained model is worth: perplexity and bits per byte."""
