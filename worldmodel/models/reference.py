"""SepsisAgent's published checkpoint folder of torch `.pt` files, read and written without torch.

The state dicts are read without running pickled code.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.files import atomic_file, atomic_folder, write_json
from worldmodel.models.clinical_model import ModelConfig, OutcomeModel, StateModel
from worldmodel.models.world_model import WorldModel
from worldmodel.scaling import FEATURE_FILE, SCALER_FILE, Scaler

ModelT = TypeVar("ModelT", StateModel, OutcomeModel)

STATE_FILE = "state_model_log.pt"
OUTCOME_FILE = "outcome.pt"

_STATE_LINEARS = {
    "static_embed": "static_embed",
    "act_embed": "act_embed",
    "vent_hidden": "vent_head.0",
    "vent_out": "vent_head.2",
    "trans_pre": "trans_pre.0",
    "mu_head": "mu_head",
    "log_sigma_head": "log_sigma_head",
}
_OUTCOME_LINEARS = {
    "static_embed": "static_embed",
    "act_embed": "act_embed",
    "outcome_hidden": "outcome_head.0",
    "outcome_out": "outcome_head.3",
}
_CONFIG = ModelConfig(variant="reference")
_SHAPE = (
    "variant",
    "hidden",
    "layers",
    "embed",
    "head",
)  # determine tensors' shapes


def is_reference_folder(path: str | Path) -> bool:
    """Whether a folder looks like a published checkpoint."""
    return (Path(path) / STATE_FILE).exists()


def load_reference(path: str | Path) -> WorldModel:
    """A world model from a published checkpoint folder.

    Raises:
      InputError: a file is missing or unreadable, or a tensor is missing, superfluous or of
        another shape.
    """
    path = Path(path)
    state = _blank(StateModel)
    outcome = _blank(OutcomeModel)
    _fill(state, _STATE_LINEARS, path / STATE_FILE)
    _fill(outcome, _OUTCOME_LINEARS, path / OUTCOME_FILE)
    return WorldModel(
        state_model=jax.tree.map(lambda leaf: leaf[None], state),
        outcome_model=jax.tree.map(lambda leaf: leaf[None], outcome),
        scaler=Scaler.from_reference(path),
        config=_CONFIG,
    )


def save_reference(world_model: WorldModel, path: str | Path) -> Path:
    """Writes a world model of the reference variant as a published checkpoint folder.

    Raises:
      InputError: the variant is not "reference" in its published shape, the model is an
        ensemble or has other steps than 4 h, or something else is in the way.
    """
    path = Path(path)
    config = world_model.config
    if any(getattr(config, name) != getattr(_CONFIG, name) for name in _SHAPE):
        raise InputError(
            "only the reference variant in its published shape fits the published folder; "
            "train with --set model.variant=reference"
        )
    if world_model.step_hours != schema.STEP_HOURS:
        raise InputError(
            f"the published folder is for 4-hour steps, this model has {world_model.step_hours:g}"
        )
    if world_model.num_members != 1:
        raise InputError("the published folder holds one model; pick one with .member(i)")

    def first(model: ModelT) -> ModelT:
        member: ModelT = jax.tree.map(lambda leaf: leaf[0], model)
        return member

    with atomic_folder(path, marker=STATE_FILE) as folder:
        state_model, outcome_model = world_model.window_models()
        state, outcome = first(state_model), first(outcome_model)
        write_state_dict(_tensors(state, _STATE_LINEARS), folder / STATE_FILE)
        write_state_dict(_tensors(outcome, _OUTCOME_LINEARS), folder / OUTCOME_FILE)
        scaler = world_model.scaler
        write_json(
            folder / SCALER_FILE,
            {
                "dyn_cols": list(schema.FEATURE_NAMES),
                "dyn_mean": np.asarray(scaler.mean, np.float64).tolist(),
                "dyn_std": np.asarray(scaler.std, np.float64).tolist(),
                "urine_log_transform": True,
                "urine_idx": schema.URINE,
            },
        )
        write_json(
            folder / FEATURE_FILE,
            {
                "dynamic_cols": list(schema.FEATURE_NAMES),
                "mask_cols": [f"{name}_mask" for name in schema.MASKED_NAMES],
                "static_cols": ["age", "gender", "charlson_comorbidity_index"],
                "act_onehot_cols": [f"act_{i}" for i in range(schema.ACTION_WIDTH)],
                "static_scaler_mean": np.asarray(scaler.static_mean)[[0, 2]].tolist(),
                "static_scaler_std": np.asarray(scaler.static_std)[[0, 2]].tolist(),
            },
        )
    return path


Visit = Callable[[nnx.Param[jax.Array], str, bool], None]


def _walk(model: StateModel | OutcomeModel, linears: dict[str, str], visit: Visit) -> None:
    """Calls `visit(parameter, torch name, transposed)` for every parameter."""
    for name, torch_name in linears.items():
        visit(getattr(model, name).kernel, f"{torch_name}.weight", True)
        visit(getattr(model, name).bias, f"{torch_name}.bias", False)
    for layer, cell in enumerate(model.gru.cells):
        visit(cell.weight_input, f"gru.weight_ih_l{layer}", True)
        visit(cell.weight_hidden, f"gru.weight_hh_l{layer}", True)
        visit(cell.bias_input, f"gru.bias_ih_l{layer}", False)
        visit(cell.bias_hidden, f"gru.bias_hh_l{layer}", False)


def _blank(model_class: type[ModelT]) -> ModelT:
    return model_class(_CONFIG, rngs=nnx.Rngs(0))


def _fill(model: StateModel | OutcomeModel, linears: dict[str, str], path: Path) -> None:
    tensors = read_state_dict(path)

    def put(parameter: nnx.Param[jax.Array], name: str, transposed: bool) -> None:
        if name not in tensors:
            raise InputError(f"{path}: tensor {name} is missing")
        value = tensors.pop(name)
        value = value.T if transposed else value
        if value.shape != parameter.shape:
            raise InputError(f"{path}: {name} has shape {value.shape}, expected {parameter.shape}")
        if not np.isfinite(value).all():
            raise InputError(f"{path}: {name} holds NaN or infinite values")
        parameter[...] = jnp.asarray(value, jnp.float32)

    _walk(model, linears, put)
    if tensors:
        raise InputError(f"{path}: unknown tensors: {', '.join(sorted(tensors)[:3])}")


def _tensors(model: StateModel | OutcomeModel, linears: dict[str, str]) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}

    def take(parameter: nnx.Param[jax.Array], name: str, transposed: bool) -> None:
        value = np.asarray(parameter[...])
        out[name] = value.T if transposed else value

    _walk(model, linears, take)
    return out


_DTYPES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "BoolStorage": np.dtype("?"),
}


class _Storage:
    """Replaces torch's storage classes when the pickle stream is read."""

    def __init__(self, name: str):
        self.dtype = _DTYPES[name]


def _rebuild_tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> np.ndarray:
    """A copy of the strided array that torch describes."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True) if n)
    empty = any(n == 0 for n in size)
    if offset < 0 or min(stride, default=0) < 0 or (not empty and last >= storage.size):
        raise pickle.UnpicklingError("tensor lies outside its storage")
    strides = tuple(step * storage.itemsize for step in stride)
    strided = np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)
    return strided.copy()


def _rebuild_parameter(tensor: np.ndarray, *_: object) -> np.ndarray:
    return tensor


class _StateDictUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> object:
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

    def persistent_load(self, pid: object) -> np.ndarray:
        if not isinstance(pid, tuple) or len(pid) != 5:
            raise pickle.UnpicklingError("unknown storage")
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
    except Exception as error:  # a malicious or damaged stream can fail in any opcode
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
