"""The exception for invalid input of users."""


class InputError(ValueError):
    """Invalid input. The message says in one line what is wrong, where, and how to correct it.

    The command line prints the message and exits with status 2.
    """


class TableError(InputError):
    """A table that is refused.

    Attributes:
      problems: every one of them, a sentence each.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
