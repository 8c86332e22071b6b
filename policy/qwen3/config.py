"""The figures of a Qwen3 or Llama, from and to the config.json of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from worldmodel.errors import InputError
from worldmodel.files import read_json

# JSON of a Hugging Face folder, checked field by field
Values = Mapping[str, Any]

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
"""What can be read, by `model_type`."""

_REFUSED = {  # setting: the values under which it changes nothing
    "attention_dropout": (0, 0.0),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "partial_rotary_factor": (None, 1, 1.0),
    "pretraining_tp": (None, 1),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
}
_LLAMA_DEFAULTS = {"rope_theta": 10000.0, "max_position_embeddings": 2048}  # old files lack them


@dataclass(frozen=True)
class RopeScaling:
    """How the angles of rotary positions are stretched for contexts longer than trained on.

    Attributes:
      rope_type: "linear", all frequencies are divided by `factor` (arXiv 2306.15595), or "llama3",
        only low ones are, and those between are interpolated (arXiv 2407.21783).
      factor: at least 1.
      low_freq_factor, high_freq_factor: frequencies that turn fewer times than the first within
        the original context are divided whole, more than the second not at all; of "llama3".
      original_max_position_embeddings: tokens of the original context; of "llama3".
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    @classmethod
    def from_hf(cls, values: Values, *, source: str) -> RopeScaling:
        """The scaling in a `rope_scaling` or `rope_parameters` of another kind than "default".

        Raises:
          InputError: an unknown kind, or a figure that is missing, of a wrong type or senseless.
        """
        kind = _rope_kind(values)
        if kind not in _SCALING_FIGURES:
            raise InputError(
                f"{source}: rope scaling of type {kind!r} is not implemented; "
                f"only {', '.join(_SCALING_FIGURES)} are"
            )
        for name in _SCALING_FIGURES[kind]:
            value = values.get(name)
            if type(value) not in (int, float) or not value > 0:  # type: ignore[operator]
                raise InputError(f"{source}: rope scaling {name} = {value!r}, expected a number")
        found = cls(kind, **{name: values[name] for name in _SCALING_FIGURES[kind]})
        if found.factor < 1:
            raise InputError(f"{source}: rope scaling factor = {found.factor}, expected at least 1")
        low, high = found.low_freq_factor, found.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise InputError(f"{source}: rope scaling low_freq_factor {low} is not below {high}")
        return found

    def to_hf(self) -> dict[str, object]:
        """The contents of `rope_scaling`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_SCALING_FIGURES: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": tuple(field.name for field in fields(RopeScaling) if field.name != "rope_type"),
}


@dataclass(frozen=True)
class Qwen3Config:
    """A dense Qwen3 or Llama of any size; names and meanings are those of config.json.

    The two differ in that a Qwen3 normalises queries and keys of each head.
    """

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
    attention_bias: bool = False
    rope_scaling: RopeScaling | None = None
    model_type: str = "qwen3"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys of each head are normalised."""
        return self.model_type == "qwen3"

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise InputError(
                f"model_type: got {self.model_type!r}, expected {' or '.join(ARCHITECTURES)}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads: {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim: got {self.head_dim}, expected an even number")

    @classmethod
    def from_hf(cls, values: Values, *, source: str) -> Qwen3Config:
        """The configuration in the contents of a config.json.

        Args:
          values: the parsed file. transformers 5 writes the base of the rotary embedding within
            `rope_parameters`, older versions at the top level; both are read.
          source: what to call the file in errors.

        Raises:
          InputError: another architecture, a setting that is not implemented (other kinds of rope
            scaling, sliding windows, biases of the MLP, quantisation), or a figure that is missing
            or of a wrong type.
        """
        model_type = values.get("model_type")
        if model_type not in ARCHITECTURES:
            raise InputError(
                f"{source}: model_type is {model_type!r}; only {' and '.join(ARCHITECTURES)} are "
                "implemented"
            )
        parts = [values, *(values.get(name) or {} for name in ("rope_parameters", "rope_scaling"))]
        for part in parts:
            for name, allowed in _REFUSED.items():
                if name in part and part[name] not in allowed:
                    raise InputError(f"{source}: {name} = {part[name]!r} is not implemented")
        other_layers = set(values.get("layer_types") or ()) - {"full_attention"}
        if other_layers:
            raise InputError(f"{source}: layer_types {sorted(other_layers)} are not implemented")
        known = {field.name: field.type for field in fields(cls)}
        figures = {
            name: values[name]
            for name in known
            if name != "rope_scaling" and values.get(name) is not None
        }
        figures |= _rope(parts, source)
        if model_type == "llama":
            figures = _LLAMA_DEFAULTS | _heads(values) | figures
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
            if type(value) not in _TYPES.get(str(known[name]), (int,)):
                raise InputError(f"{source}: {name} = {value!r}, expected {known[name]}")
        return cls(**figures)

    def to_hf(self, *, dtype: str) -> dict[str, object]:
        """The contents of a config.json that transformers 4 and 5 and vLLM read alike.

        Args:
          dtype: of the weights beside it, such as "bfloat16".
        """
        scaling = self.rope_scaling.to_hf() if self.rope_scaling else {"rope_type": "default"}
        of_kind = {"use_sliding_window": False} if self.qk_norm else {"mlp_bias": False}
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "rope_scaling": scaling if self.rope_scaling else None,
            "rope_parameters": {**scaling, "rope_theta": self.rope_theta},
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "torch_dtype": dtype,
            "use_cache": True,
            **of_kind,
        }


_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "float": (int, float),
    "str": (str,),
    "RopeScaling | None": (RopeScaling,),
}
"""What is accepted for a field, by its annotation; whole numbers where it is not listed."""

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


def _rope(parts: Sequence[Values], source: str) -> dict[str, float | RopeScaling]:
    """`rope_theta` and `rope_scaling`, each where some part of a file has it."""
    thetas: set[float] = set()
    scalings: set[RopeScaling] = set()
    for part in parts:
        if _rope_kind(part) != "default":
            scalings.add(RopeScaling.from_hf(part, source=source))
        if part.get("rope_theta") is not None:
            thetas.add(float(part["rope_theta"]))
    figures: dict[str, float | RopeScaling] = {}
    for name, found in (("rope_theta", thetas), ("rope_scaling", scalings)):
        if len(found) > 1:
            raise InputError(f"{source}: {name} has several values {sorted(map(str, found))}")
        if found:
            figures[name] = found.pop()
    return figures


def _rope_kind(part: Values) -> object:
    return part.get("rope_type", part.get("type", "default"))


def _heads(values: Values) -> dict[str, int]:
    """What Llama's files leave out: by default there are no groups, and heads share the width."""
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if type(width) is not int or type(heads) is not int or heads < 1:
        return {}
    return {"num_key_value_heads": heads, "head_dim": width // heads}
