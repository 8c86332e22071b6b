"""`python -m sepsis_jax`: the same as the command `sepsis-jax`."""

import sys

from sepsis_jax.compiled_programs import keep_compiled_programs


def main() -> None:
    """Entry point, which may be interrupted while everything else is imported."""
    try:
        if sys.argv[1:2] != ["bench"]:  # times how long compiling takes
            keep_compiled_programs()
        from sepsis_jax import cli
    except KeyboardInterrupt:
        print("sepsis-jax: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
