"""The one exception that users are meant to see."""


class InputError(ValueError):
    """Bad input: says what is wrong, where, and how to mend it, in one line.

    The command line prints the message and exits with status 2.
    """
