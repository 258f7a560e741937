"""``python -m gpt1_jax`` is the same as ``gpt1``."""

from gpt1_jax.cli import main

if __name__ == "__main__":
    main()
