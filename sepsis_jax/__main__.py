"""`python -m sepsis_jax`: the same as the command `sepsis-jax`."""

from sepsis_jax.cli import main

if __name__ == "__main__":
    main()
