"""`python -m sepsis_jax`: the same as the command `sepsis-jax`."""

import sys


def main() -> None:
    """Entry point, which may be interrupted while everything else is imported."""
    try:
        from sepsis_jax import cli
    except KeyboardInterrupt:
        print("sepsis-jax: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
