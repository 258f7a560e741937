"""GPT-1 in JAX: the whole life of a language model, from text to exported weights."""
