"""Weights of a Qwen3 or Llama from and to Hugging Face folders of safetensors, without torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from policy.qwen3.config import load_config
from policy.qwen3.lora import merge_adapters
from policy.qwen3.model import Qwen3
from policy.qwen3.sharding import param_spec
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, read_json, write_json

MARKER = "config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"BF16": jnp.bfloat16, "F32": np.float32, "F16": np.float16}
_COMPANIONS = (  # what a tokenizer and a sampler need beside the weights
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)

# names and numbers of layers, as flax gives them
Key = tuple[Any, ...]


def load(
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Qwen3:
    """A Qwen3 or Llama from a Hugging Face folder (config.json, one or several safetensors files).

    Args:
      path: the folder.
      dtype: of activations and products; that of the parameters if not given.
      param_dtype: of the parameters; that of the files if not given.
      mesh: with the axes of `partitioning.AXES`, to lay the parameters out over its devices.

    Raises:
      InputError: the folder or a file is missing or damaged, the architecture is not implemented,
        or a tensor is missing, unknown or of another shape than config.json says.
    """
    path = Path(path)
    config = load_config(path)
    with ExitStack() as stack:
        tensors = _Tensors(path, stack)
        param_dtype = jnp.dtype(param_dtype or tensors.dtype)
        dtype = jnp.dtype(dtype or param_dtype)
        graphdef, state = nnx.split(
            nnx.eval_shape(
                lambda: Qwen3(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
            )
        )
        loaded = []
        for name, variable in nnx.to_flat_state(state):
            array = tensors.read(name, variable.shape, param_dtype)
            if mesh is None:
                placed = jax.device_put(array)
            else:  # of several processes each puts its shards in place
                where = NamedSharding(mesh, param_spec(name, array.ndim))
                placed = jax.make_array_from_callback(array.shape, where, array.__getitem__)
            loaded.append((name, variable.replace(placed)))
        known = {"lm_head.weight"} if config.tie_word_embeddings else set()
        unknown = tensors.unread - known
        if unknown:
            raise InputError(f"{path}: unknown tensor {min(unknown)} ({len(unknown)} such)")
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def save_hf(
    model: Qwen3,
    path: str | Path,
    *,
    source: str | Path | None = None,
    max_file_bytes: int = 5 * 2**30,
) -> Path:
    """Writes a folder that transformers and vLLM load; it appears whole or not at all.

    Adapters are merged into the weights. Tied embeddings are written once.

    Args:
      path: folder to make; an older model there is replaced.
      source: a Hugging Face folder whose tokenizer and generation settings are copied.
      max_file_bytes: no file is larger, unless a single tensor is.

    Raises:
      InputError: something other than a model is in the way, or `source` is no folder.
    """
    path = Path(path).absolute()
    if source is not None and not Path(source).is_dir():
        raise InputError(f"{source}: no such folder, to copy the tokenizer from")
    params = dict(nnx.to_flat_state(nnx.state(merge_adapters(model), nnx.Param)))
    sizes = {
        name: size for key, param in params.items() for name, size in _tensor_sizes(key, param)
    }
    files = _assign(sizes, max_file_bytes)
    with atomic_folder(path, marker=MARKER) as folder:
        for filename, names in files.items():
            wanted = set(names)
            tensors = {
                name: tensor
                for key, param in params.items()
                for name, tensor in _hf_tensors(key, param, wanted)
            }
            save_file(tensors, folder / filename, metadata={"format": "pt"})
        if len(files) > 1:
            where = {name: filename for filename, names in files.items() for name in names}
            total = {"total_size": sum(sizes.values())}
            write_json(folder / _INDEX, {"metadata": total, "weight_map": where})
        dtype = jnp.dtype(model.embed_tokens.embedding.dtype).name
        write_json(folder / MARKER, model.config.to_hf(dtype=dtype))
        for name in _COMPANIONS if source is not None else ():
            if (Path(source) / name).is_file():  # type: ignore[arg-type]
                shutil.copyfile(Path(source) / name, folder / name)  # type: ignore[arg-type]
    return path


class _Tensors:
    """The tensors of a folder, each read when asked for."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        self.where: dict[str, Any] = {}
        for filename in _filenames(folder):
            try:
                file = stack.enter_context(safe_open(folder / filename, framework="np"))
            except (OSError, SafetensorError) as error:
                raise InputError(f"{folder / filename}: not readable ({error})") from None
            self.where |= dict.fromkeys(file.keys(), file)
        self.unread = set(self.where)
        kinds = {self.where[name].get_slice(name).get_dtype() for name in self.where}
        if len(kinds) != 1 or not kinds <= set(_DTYPES):
            raise InputError(
                f"{folder}: weights are {', '.join(sorted(kinds)) or 'missing'}; "
                f"expected one of {', '.join(_DTYPES)} throughout"
            )
        self.dtype = _DTYPES[kinds.pop()]

    def read(self, key: Key, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """The array of a parameter of our model: stacked, kernels as [in, out]."""
        transposed = key[-1] == "kernel"
        if key[0] != "layers":
            return self._one(_hf_name(key), shape, transposed).astype(dtype, copy=False)
        out = np.empty(shape, dtype)
        for layer in range(shape[0]):
            out[layer] = self._one(_hf_name(key, layer), shape[1:], transposed)
        return out

    def _one(self, name: str, shape: tuple[int, ...], transposed: bool) -> np.ndarray:
        if name not in self.where:
            raise InputError(f"{self.folder}: tensor {name} missing")
        tensor = self.where[name].get_tensor(name)
        self.unread.discard(name)
        tensor = tensor.T if transposed else tensor
        if tensor.shape != shape:
            raise InputError(
                f"{self.folder}: tensor {name} gives {tensor.shape}, config.json says {shape}"
            )
        result: np.ndarray = tensor
        return result


def _filenames(folder: Path) -> list[str]:
    if not (folder / _INDEX).exists():
        if not (folder / _SINGLE).exists():
            raise InputError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there")
        return [_SINGLE]
    index = read_json(folder / _INDEX)
    where = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(where, Mapping) or not where:
        raise InputError(f"{folder / _INDEX}: has no weight_map")
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{folder / _INDEX}: names {name}, which is not in the folder")
    return names


def _hf_name(key: Key, layer: int | None = None) -> str:
    module = ".".join(key[1:-1])
    if layer is not None:
        kind = "bias" if key[-1] == "bias" else "weight"
        return f"model.layers.{layer}.{module}.{kind}"
    return "lm_head.weight" if key[0] == "lm_head" else f"model.{key[0]}.weight"


def _tensor_sizes(key: Key, param: jax.Array) -> Iterator[tuple[str, int]]:
    size = int(np.prod(param.shape)) * jnp.dtype(param.dtype).itemsize
    if key[0] != "layers":
        yield _hf_name(key), size
        return
    for layer in range(param.shape[0]):
        yield _hf_name(key, layer), size // param.shape[0]


def _hf_tensors(key: Key, param: jax.Array, wanted: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    def tensor(value: jax.Array) -> np.ndarray:
        array = np.asarray(value)
        return np.ascontiguousarray(array.T if key[-1] == "kernel" else array)

    if key[0] != "layers":
        if _hf_name(key) in wanted:
            yield _hf_name(key), tensor(param[...])
        return
    for layer in range(param.shape[0]):
        if _hf_name(key, layer) in wanted:
            yield _hf_name(key, layer), tensor(param[...][layer])


def _assign(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    files: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes, key=_reading_order):
        if files[-1] and filled + sizes[name] > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += sizes[name]
    if len(files) == 1:
        return {_SINGLE: files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": names
        for number, names in enumerate(files, 1)
    }


def _reading_order(name: str) -> tuple[int, str]:
    """Embeddings, layers by number, the rest."""
    parts = name.split(".")
    if parts[1] == "layers":
        return int(parts[2]), name
    return (-1 if parts[1] == "embed_tokens" else 10**6), name
