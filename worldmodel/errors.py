"""The exception for invalid input of users."""


class InputError(ValueError):
    """Invalid input. The message says in one line what is wrong, where, and how to correct it.

    The command line prints the message and exits with status 2.
    """
