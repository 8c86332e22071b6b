"""Runs a server and ends it with all its children when asked to, or when the starter is gone.

Usage: guard.py PID_OF_STARTER SECONDS_OF_GRACE COMMAND...  Leads a process group of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

_TICK_S = 0.2
_CHILDREN_S = 1.0  # for the server's own children, which end a little later
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _process_control(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_guard() -> None:
    # Should the guard itself be killed outright, Linux ends the server; other systems do not.
    _process_control(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_for_children() -> None:
    deadline = time.monotonic() + _CHILDREN_S
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(_TICK_S / 4)


def main() -> None:
    """Watches until the server ends, then kills whatever is left of the group, itself included."""
    starter, grace_s, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    _process_control(
        _PR_SET_CHILD_SUBREAPER, 1
    )  # the server's orphans become children of this process
    # This process has one thread, which makes code between fork and exec safe.
    server = subprocess.Popen(command, preexec_fn=_die_with_guard)
    while server.poll() is None and not asked and os.getppid() == starter:
        time.sleep(_TICK_S)
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(grace_s)
    print(f"server ended with status {server.poll()}", flush=True)
    _wait_for_children()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
