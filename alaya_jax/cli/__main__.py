"""`python -m alaya_jax.cli` is `alaya`."""

from alaya_jax.cli import main

if __name__ == "__main__":
    main()
