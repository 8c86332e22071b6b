"""Whether a folder holds what a server can load, found out before the server is touched.

A load that fails half-way leaves vLLM 0.32 without weights, and its engine dies at the next token.
"""

from __future__ import annotations

import json
from pathlib import Path

from policy.serving.backend import BackendError


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a folder by name, from the headers of its safetensors files.

    Raises:
      BackendError: there are none, or a file is cut off or is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118, not a mapping
                    found[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise BackendError(f"{path}: not a whole safetensors file ({error})") from None
    if not found:
        raise BackendError(f"{folder}: no weights (*.safetensors)")
    return found


def check_weights(folder: Path, like: Path) -> None:
    """Makes sure that weights can take the place of others.

    Raises:
      BackendError: a file is missing or cut off, or tensors have other names or shapes.
    """
    new, old = shapes(folder), shapes(like)
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name):
            raise BackendError(
                f"{folder}: {name} is {_shape(new.get(name))}, in {like} it is "
                f"{_shape(old.get(name))}; weights to swap need equal names and shapes"
            )


def check_adapter(folder: Path) -> None:
    """Makes sure that a folder holds a LoRA adapter in PEFT's form.

    Raises:
      BackendError: it does not.
    """
    path = folder / "adapter_config.json"
    try:
        json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BackendError(f"{path}: not readable JSON ({error})") from None
    shapes(folder)


def fingerprint(folder: Path) -> str:
    """Tells files apart by path, size and time of writing, without reading gigabytes."""
    stats = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return json.dumps([str(folder.resolve()), *((n, s.st_size, s.st_mtime_ns) for n, s in stats)])


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a scalar"
