"""Low-rank adapters (LoRA, arXiv 2106.09685) on a decoder's projections, in PEFT's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from policy.qwen3.model import Linear, Qwen3, product
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, read_json, write_json

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MARKER, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_REFUSED = {  # setting of PEFT: the values under which it changes nothing
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "use_dora": (False,),
    "use_rslora": (False,),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None,),
}


class Adapter(nnx.Module):
    """(alpha / rank) x a b, in each layer.

    Parameters, as `nnx.LoRAParam`: `a` [L, in, rank] and `b` [L, rank, out].
    """

    def __init__(self, a: jax.Array, b: jax.Array, *, alpha: float):
        self.a = nnx.LoRAParam(a)
        self.b = nnx.LoRAParam(b)
        self.alpha = alpha

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.a.shape[-1]

    def __call__(self, x: Float[Array, "*b I"]) -> Float[Array, "*b O"]:
        """[..., O] scaled product with the low-rank matrices."""
        low = product(x, self.a[...].astype(x.dtype))
        return self.scale * product(low, self.b[...].astype(x.dtype))


def add_adapters(
    model: Qwen3,
    *,
    rank: int,
    alpha: float,
    rngs: nnx.Rngs,
    targets: Sequence[str] = PROJECTIONS,
    dtype: DTypeLike = jnp.float32,
) -> Qwen3:
    """A model that shares the given one's weights and has adapters, which change nothing yet.

    They alone are trained with `nnx.grad(..., argnums=nnx.DiffState(0, nnx.LoRAParam))` or
    `nnx.split(model, nnx.LoRAParam, ...)`.

    Args:
      model: without adapters.
      rank: of the adapters.
      alpha: their product is multiplied by alpha / rank.
      rngs: of `a`, uniform within 1 / sqrt(in) as in PEFT; `b` is zero.
      targets: of `PROJECTIONS`.
      dtype: of the adapters.

    Raises:
      InputError: an unknown target, a rank below 1, or the model has adapters already.
    """
    unknown = set(targets) - set(PROJECTIONS)
    if unknown or not targets:
        raise InputError(f"targets: got {sorted(targets)}, expected some of {list(PROJECTIONS)}")
    if rank < 1:
        raise InputError(f"rank: got {rank}, expected at least 1")
    model = nnx.clone(model)
    if adapted(model):
        raise InputError("the model has adapters already; merge them first")
    for name, linear in _projections(model).items():
        if name in targets:
            layers, n_in, n_out = linear.kernel.shape
            bound = n_in**-0.5
            a = jax.random.uniform(rngs.params(), (layers, n_in, rank), dtype, -bound, bound)
            linear.adapter = Adapter(a, jnp.zeros((layers, rank, n_out), dtype), alpha=alpha)
    return model


def merge_adapters(model: Qwen3) -> Qwen3:
    """A model whose kernels hold what the adapters add; without adapters, an equal one."""
    merged = nnx.clone(model)
    for linear in adapted(merged).values():
        adapter = linear.adapter
        added = jnp.matmul(adapter.a[...], adapter.b[...], preferred_element_type=jnp.float32)
        kernel = linear.kernel[...]
        summed = kernel.astype(jnp.float32) + adapter.scale * added
        linear.kernel[...] = summed.astype(kernel.dtype)
        linear.adapter = None
    return merged


def adapted(model: Qwen3) -> dict[str, Linear]:
    """The projections that have an adapter, by name."""
    found = _projections(model)
    return {name: linear for name, linear in found.items() if linear.adapter is not None}


def save_adapters(model: Qwen3, path: str | Path, *, base: str) -> Path:
    """Writes the adapters as PEFT does, for PEFT and vLLM to load.

    Args:
      path: folder to make; older adapters there are replaced.
      base: name or folder of the model beneath, for whoever loads them.

    Raises:
      InputError: the model has no adapters, or something else is in the way.
    """
    found = adapted(model)
    if not found:
        raise InputError("the model has no adapters to save")
    first = next(iter(found.values())).adapter
    tensors = {}
    for name, linear in found.items():
        for letter, param in (("A", linear.adapter.a), ("B", linear.adapter.b)):
            for layer, value in enumerate(np.asarray(param[...])):
                tensors[_peft_name(name, layer, letter)] = np.ascontiguousarray(value.T)
    path = Path(path).absolute()
    with atomic_folder(path, marker=MARKER) as folder:
        save_file(tensors, folder / _TENSORS, metadata={"format": "pt"})
        write_json(
            folder / MARKER,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base,
                "r": first.a.shape[-1],
                "lora_alpha": first.alpha,
                "lora_dropout": 0.0,
                "target_modules": sorted(found),
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
                "init_lora_weights": True,
                "modules_to_save": None,
                "use_dora": False,
                "use_rslora": False,
            },
        )
    return path


def load_adapters(model: Qwen3, path: str | Path) -> Qwen3:
    """A model that shares the given one's weights and has the adapters of a PEFT folder.

    Raises:
      InputError: the folder is missing, damaged or of another kind, uses what is not implemented
        (DoRA, rank-stabilised scaling, patterns, trained biases), or does not fit the model.
    """
    path = Path(path)
    settings = read_json(path / MARKER)
    rank, alpha, targets = _settings(settings, str(path / MARKER))
    try:
        tensors = load_file(path / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path / _TENSORS}: not readable ({error})") from None
    dtype = next(iter(tensors.values())).dtype if tensors else jnp.float32
    model = add_adapters(
        model, rank=rank, alpha=alpha, rngs=nnx.Rngs(0), targets=targets, dtype=dtype
    )
    for name, linear in adapted(model).items():
        for letter, param in (("A", linear.adapter.a), ("B", linear.adapter.b)):
            layers, *shape = param.shape
            values = np.empty(param.shape, param.dtype)
            for layer in range(layers):
                tensor = tensors.pop(_peft_name(name, layer, letter), None)
                if tensor is None or tensor.shape != tuple(reversed(shape)):
                    raise InputError(
                        f"{path}: tensor {_peft_name(name, layer, letter)} is "
                        f"{'missing' if tensor is None else tensor.shape}, "
                        f"expected {tuple(reversed(shape))}"
                    )
                values[layer] = tensor.T
            param[...] = jnp.asarray(values)
    if tensors:
        raise InputError(f"{path}: unknown tensor {min(tensors)} ({len(tensors)} such)")
    return model


def _projections(model: Qwen3) -> dict[str, Linear]:
    attention, mlp = model.layers.self_attn, model.layers.mlp
    return {
        name: getattr(attention if hasattr(attention, name) else mlp, name) for name in PROJECTIONS
    }


def _peft_name(projection: str, layer: int, letter: str) -> str:
    block = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"base_model.model.model.layers.{layer}.{block}.{projection}.lora_{letter}.weight"


def _settings(settings: object, source: str) -> tuple[int, float, list[str]]:
    if not isinstance(settings, Mapping) or settings.get("peft_type") != "LORA":
        raise InputError(f"{source}: not the settings of a LoRA adapter")
    for name, allowed in _REFUSED.items():
        if name in settings and settings[name] not in allowed:
            raise InputError(f"{source}: {name} = {settings[name]!r} is not implemented")
    rank, alpha, targets = (settings.get(name) for name in ("r", "lora_alpha", "target_modules"))
    if not (type(rank) is int and type(alpha) in (int, float) and isinstance(targets, list)):
        raise InputError(f"{source}: r, lora_alpha or target_modules missing or malformed")
    return rank, alpha, targets  # type: ignore[return-value]
