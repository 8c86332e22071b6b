"""Configurations: frozen dataclasses filled from YAML, with an error for unknown keys."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from worldmodel.errors import InputError

T = TypeVar("T")

LARGEST_SEED = 2**32 - 1
LARGEST = 2**31 - 1  # of sizes and counts: arrays are indexed with 32 bits
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


# a check knows the type of its field
def require(config: object, expected: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Checks fields of a configuration.

    Raises:
      InputError: a value is not as expected.
    """
    for name in names:
        value = getattr(config, name)
        if not holds(value):
            raise InputError(f"{name}: got {value}, expected {expected}")


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would take the last."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} comes twice", node.start_mark
                )
        found: dict[Hashable, object] = super().construct_mapping(node, deep=deep)
        return found


def read_yaml(text: str) -> object:
    """What a text in YAML says; nothing but plain values, lists and mappings.

    Raises:
      yaml.YAMLError: it is not YAML, or a key comes twice.
    """
    result: object = yaml.load(text, _Loader)
    return result


def load_config(cls: type[T], path: str | Path) -> T:
    """An instance of a (nested) dataclass from a YAML file.

    Raises:
      InputError: the file is missing, is not YAML, or a key is unknown or of a wrong type.
    """
    path = Path(path)
    try:
        value = read_yaml(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; see configs/ for examples") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable YAML ({error})") from None
    return from_mapping(cls, {} if value is None else value, source=str(path))


def resolve_config(
    cls: type[T], path: str | Path | None, overrides: Sequence[str] | None, *, source: str
) -> T:
    """Settings from a YAML file (the defaults without one), then changed by overrides.

    Raises:
      InputError: as `load_config` and `apply_overrides`.
    """
    config = load_config(cls, path) if path else cls()
    return apply_overrides(config, overrides or [], source=source)


def from_mapping(cls: type[T], value: object, *, source: str, base: T | None = None) -> T:
    """An instance of a (nested) dataclass from nested mappings.

    Args:
      cls: the dataclass.
      value: its settings by name.
      source: named in errors.
      base: has the settings that are not given; the defaults if there is none.

    A dataclass may list earlier names of its settings in `RENAMED: ClassVar[dict[str, str]]`; the
    error for one of them gives the name that it has now.

    Raises:
      InputError: a key is unknown, or a value has another type than the field.
    """
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments: dict[str, object] = {}
    for key, item in _mapping(value, source).items():
        if key not in names:
            _require_current(cls, str(key), source)
            raise InputError(f"{source}: unknown setting {key!r}; known: {', '.join(names)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            part = getattr(base, key, None)
            arguments[key] = from_mapping(hint, item, source=f"{source}: {key}", base=part)  # type: ignore[arg-type]
        else:
            arguments[key] = _checked(hint, item, f"{source}: {key}")
            _require_range(key, arguments[key], f"{source}: {key}")
    return cls(**arguments) if base is None else dataclasses.replace(base, **arguments)  # type: ignore[type-var]


def _require_current(cls: type, key: str, source: str) -> None:
    """Refuses an earlier name of a setting, as listed in `RENAMED` of its dataclass."""
    name = key.partition(".")[0]  # the rest of an override's path below a name that is unknown
    if name in getattr(cls, "RENAMED", {}):
        raise InputError(f"{source}: {name}: renamed, now {cls.RENAMED[name]}")  # type: ignore[attr-defined]


def _mapping(value: object, source: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise InputError(f"{source}: expected a mapping of settings, got {type(value).__name__}")
    return value


def _require_range(name: str, value: object, source: str) -> None:
    """Refuses numbers that no generator takes as a seed and no array has as a size."""
    if type(value) is not int:
        return
    seed = name == "seed" or name.endswith("_seed")
    low, high = (0, LARGEST_SEED) if seed else (-LARGEST - 1, LARGEST)
    if not low <= value <= high:
        raise InputError(f"{source}: got {value}, expected {low} to {high}")


def _checked(hint: object, value: object, source: str) -> object:
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if parts[-1] is Ellipsis and isinstance(value, list | tuple):
            parts = parts[:1] * len(value)
        if parts[-1:] == (Ellipsis,):
            raise InputError(f"{source}: got {value!r}, expected a list")
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            raise InputError(f"{source}: got {value!r}, expected a list of {len(parts)}")
        return tuple(_checked(part, item, source) for part, item in zip(parts, value, strict=True))
    allowed = get_args(hint) or (hint,)
    lists = [part for part in allowed if get_origin(part) is tuple]
    if lists and value is not None:
        return _checked(lists[0], value, source)
    if Path in allowed and isinstance(value, str):
        return Path(value)
    allowed = tuple(option for option in allowed if isinstance(option, type))
    if float in allowed and type(value) is int:
        return float(value)
    if float in allowed and isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)  # YAML 1.1 takes numbers such as 1e-6, without a point, for text
    if type(value) not in allowed:
        names = " or ".join(option.__name__ for option in allowed)
        raise InputError(f"{source}: got {value!r}, expected {names}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{source}: got {value}, expected a finite number")
    return value


def apply_overrides(config: T, overrides: Sequence[str], *, source: str) -> T:
    """Changes settings named as `NAME=VALUE` or `NAME.PART=VALUE`, values read as YAML.

    Settings are checked when all are changed, so that their order does not matter; of two values
    for one setting the later is used.

    Raises:
      InputError: an override is malformed, or names an unknown setting, or has a wrong type.
    """
    changes: dict[str, object] = {}
    for override in overrides:
        path, sign, text = override.partition("=")
        if not sign:
            raise InputError(f"{source}: {override!r} is not NAME=VALUE")
        try:
            value = read_yaml(text)
        except yaml.YAMLError:
            raise InputError(f"{source}: {override!r} is not readable YAML after the '='") from None
        _put(changes, config, path.split("."), value, source)
    return from_mapping(type(config), changes, source=source, base=config)


def _put(
    changes: dict[str, object], config: object, path: list[str], value: object, source: str
) -> None:
    """Adds a change to `changes`, nested like the configuration; unknown names are kept."""
    name, *rest = path
    part = getattr(config, name, None)
    if not dataclasses.is_dataclass(part):
        changes[".".join(path)] = value
        return
    inside, source = changes.setdefault(name, {}), f"{source}: {name}"
    assert isinstance(inside, dict)  # only this function fills it
    if rest:
        _put(inside, part, rest, value, source)
        return
    for key, item in _mapping(value, source).items():
        _put(inside, part, [str(key)], item, source)
