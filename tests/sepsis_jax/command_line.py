"""Running `sepsis-jax` in this process, and what tests ask of it."""

import json
import sys
from pathlib import Path

import pytest

from sepsis_jax import cli

# These tests ask whether it runs, not whether it is good.
FAST = (
    "--set", "model={variant: reference, hidden: 8, layers: 1, embed: 4, head: 4}",
    "--set", "state={epochs: 2, batch_size: 64}",
    "--set", "outcome={epochs: 1}",
)  # fmt: skip


class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    @property
    def last_json(self):
        return json.loads(self.out.rstrip("\n").split("\n")[-1])


def call(capture, *arguments):
    """Runs `sepsis-jax ARGUMENTS` in this process."""
    capture.readouterr()
    status = _status_of(arguments)
    return Result(status, *capture.readouterr())


def finish(*arguments):
    """The same from a fixture, where nothing captures; it must succeed."""
    assert not _status_of(arguments)


def _status_of(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sepsis-jax", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0
    return 0


def leftovers(folder: Path):
    return sorted(path.name for path in folder.iterdir())


def refuse(result, *words):
    """Status 2 and one line on stderr that holds the words."""
    assert result.status == 2, (result.status, result.out, result.err)
    assert result.err.startswith("sepsis-jax: ") and result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err
    assert "Traceback" not in result.out
