"""What is made once for all workers of a run."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


def made_once(name: str, make: Callable[[Path], object], tmp_path_factory, worker_id) -> Path:
    """The folder that `make(folder)` filled, called by the first worker that asks.

    Tests only read there. The lock ends with its process, so a worker that is killed holds up
    nobody.
    """
    base = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        base = base.parent
    folder, half = base / f"once-{name}", base / f"half-{name}"
    with (base / f"once-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            make(half)
            half.rename(folder)
    return folder
