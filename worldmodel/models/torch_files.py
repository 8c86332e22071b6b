"""torch `.pt` state dicts, read and written without torch and without running pickled code.

A `.pt` file is a zip archive: `data.pkl` describes the tensors, `data/<key>` holds their bytes.
The reader's unpickler knows four names and refuses every other; the writer emits the few
opcodes that `torch.load(weights_only=True)` accepts.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.errors import InputError
from worldmodel.files import atomic_file

_DTYPES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "BoolStorage": np.dtype("?"),
}


class _Storage:
    """Stands for torch's storage classes in the pickle stream."""

    def __init__(self, name: str):
        self.dtype = _DTYPES[name]


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> Any:
    """A copy of the strided view that torch describes."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True) if n)
    empty = any(n == 0 for n in size)
    if offset < 0 or min(stride, default=0) < 0 or (not empty and last >= storage.size):
        raise pickle.UnpicklingError("tensor lies outside its storage")
    strides = tuple(step * storage.itemsize for step in stride)
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)
    return view.copy()


def _rebuild_parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor


class _StateDictUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch" and name in _DTYPES:
            return _Storage(name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a state dict")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("unknown storage")
        raw = self._archive.read(f"{self._root}/data/{key}")
        return np.frombuffer(raw, storage.dtype, int(count))


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Tensors by name from a torch state dict.

    Raises:
      InputError: the file is missing, is no zip archive, or holds more than plain tensors.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise InputError(f"{path}: not a torch state dict (no data.pkl inside)")
            value = _StateDictUnpickler(archive, pickles[0].removesuffix("/data.pkl")).load()
    except zipfile.BadZipFile:
        raise InputError(
            f"{path}: not a zip archive; save it again with torch.save(model.state_dict(), path)"
        ) from None
    except InputError:
        raise
    except Exception as error:  # a hostile or damaged stream can fail in any opcode
        raise InputError(f"{path}: not a plain torch state dict ({error})") from None
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(tensor, np.ndarray) for name, tensor in value.items()
    ):
        raise InputError(f"{path}: holds more than named tensors; save model.state_dict() alone")
    return dict(value)


def write_state_dict(tensors: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Writes float32 tensors as a state dict that torch loads with `weights_only=True`."""
    arrays = {name: np.ascontiguousarray(value, "<f4") for name, value in tensors.items()}
    stream = b"\x80\x02" + b"}"  # protocol 2, empty dict
    for key, (name, array) in enumerate(arrays.items()):
        stream += _text(name) + _tensor(str(key), array) + b"s"
    stream += b"."
    with (
        atomic_file(Path(path)) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.writestr("archive/data.pkl", stream)
        archive.writestr("archive/byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", b"3\n")


def _tensor(key: str, array: np.ndarray) -> bytes:
    strides = tuple(step // array.itemsize for step in array.strides)
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu")
    storage += _integer(array.size) + b"tQ"  # tuple, persistent id
    arguments = b"(" + storage + _integer(0) + _shape(array.shape) + _shape(strides)
    arguments += b"\x89" + b"ccollections\nOrderedDict\n)R" + b"t"  # no gradient, no hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _shape(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(_integer(value) for value in values) + b"t"
