"""The figures of a Qwen3, from and to the config.json of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from worldmodel.errors import InputError
from worldmodel.files import read_json

ARCHITECTURE = "Qwen3ForCausalLM"
_REFUSED = {  # setting: the values under which it changes nothing
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "use_sliding_window": (False,),
}


@dataclass(frozen=True)
class Qwen3Config:
    """A dense Qwen3 of any size; names and meanings are those of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads: {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim: got {self.head_dim}, expected an even number")

    @classmethod
    # JSON of a Hugging Face folder, checked field by field
    def from_hf(cls, values: Mapping[str, Any], *, source: str) -> Qwen3Config:
        """The configuration in the contents of a config.json.

        Args:
          values: the parsed file. transformers 5 writes the base of the rotary embedding within
            `rope_parameters`, older versions at the top level; both are read.
          source: what to call the file in errors.

        Raises:
          InputError: another architecture, a setting that is not implemented (rope scaling,
            sliding windows, biases, quantisation), or a figure that is missing or of a wrong type.
        """
        if values.get("model_type") != "qwen3":
            raise InputError(
                f"{source}: model_type is {values.get('model_type')!r}; only qwen3 is implemented"
            )
        for name, allowed in _REFUSED.items():
            if name in values and values[name] not in allowed:
                raise InputError(f"{source}: {name} = {values[name]!r} is not implemented")
        other_layers = set(values.get("layer_types") or ()) - {"full_attention"}
        if other_layers:
            raise InputError(f"{source}: layer_types {sorted(other_layers)} are not implemented")
        known = {field.name: field.type for field in fields(cls)}
        figures = {name: values[name] for name in known if values.get(name) is not None}
        figures["rope_theta"] = _rope_theta(values, source)
        missing = [
            field.name
            for field in fields(cls)
            if field.name not in figures and field.default is MISSING
        ]
        if missing:
            raise InputError(f"{source}: {', '.join(missing)} missing")
        if isinstance(figures.get("eos_token_id"), list):
            figures["eos_token_id"] = figures["eos_token_id"][0]
        for name, value in figures.items():
            expected = {"bool": (bool,), "float": (int, float)}.get(str(known[name]), (int,))
            if type(value) not in expected:
                raise InputError(f"{source}: {name} = {value!r}, expected {known[name]}")
        return cls(**figures)

    def to_hf(self, *, dtype: str) -> dict[str, object]:
        """The contents of a config.json that transformers 4 and 5 and vLLM read alike.

        Args:
          dtype: of the weights beside it, such as "bfloat16".
        """
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen3",
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "torch_dtype": dtype,
            "use_cache": True,
            "use_sliding_window": False,
        }


QWEN3_4B = Qwen3Config(
    vocab_size=151_936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=5e6,
    tie_word_embeddings=True,
    max_position_embeddings=262_144,
)
"""Of Qwen3-4B-Instruct-2507."""


def load_config(folder: str | Path) -> Qwen3Config:
    """The configuration of a Hugging Face folder.

    Raises:
      InputError: as `Qwen3Config.from_hf`, or there is no readable config.json.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    if not isinstance(values, Mapping):
        raise InputError(f"{path}: expected a JSON object")
    return Qwen3Config.from_hf(values, source=str(path))


def load_stop_ids(folder: str | Path) -> tuple[int, ...]:
    """The tokens that end generation, of generation_config.json or else of config.json.

    Raises:
      InputError: neither file names any.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        found = read_json(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    raise InputError(f"{folder}: no eos_token_id in generation_config.json or config.json")


def _rope_theta(values: Mapping[str, Any], source: str) -> float:
    found = set()
    for part in (values, values.get("rope_parameters") or {}, values.get("rope_scaling") or {}):
        kind = part.get("rope_type", part.get("type", "default"))
        if kind != "default":
            raise InputError(f"{source}: rope scaling of type {kind!r} is not implemented")
        if part.get("rope_theta") is not None:
            found.add(float(part["rope_theta"]))
    if len(found) != 1:
        which = f"has several values {sorted(found)}" if found else "missing"
        raise InputError(f"{source}: rope_theta {which}")
    return found.pop()
