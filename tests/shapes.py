"""Checks the shapes and dtypes that the packages annotate, while the tests run.

The checker keeps to arrays. beartype on every annotation is not possible: stand-ins of models,
episodes and policies in the tests are not of the annotated classes, names that are imported for
type checkers alone do not exist at run time, and functions of `jax.Array` are called with NumPy
arrays and with numbers, which JAX takes alike.
"""

from __future__ import annotations

import functools
import operator
import types
import typing

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_ARRAYS = (jax.Array, np.ndarray)
_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))


def _is_array(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _mentions_arrays(hint: object) -> bool:
    return _is_array(hint) or any(_mentions_arrays(part) for part in typing.get_args(hint))


def _widened(hint: typing.Any) -> typing.Any:
    """The hint with NumPy and JAX arrays alike, and numbers where an array may have no axes."""
    if _is_array(hint):
        kinds = [hint.dtype[kind, hint.dim_str] for kind in _ARRAYS]
        if hint.dim_str.strip() == "" or hint.dim_str.split()[0].startswith(("*", "...")):
            kinds += [int, float, bool, np.generic] if len(hint.dim_str.split()) < 2 else []
        return functools.reduce(operator.or_, kinds)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(_widened, parts))
    if origin is tuple and _mentions_arrays(hint):
        return tuple[tuple(_widened(part) for part in parts)]
    return hint if not _mentions_arrays(hint) else typing.Any


def arrays_checked(function):
    """`function` with its annotated arrays checked, for `jaxtyping.install_import_hook`."""
    hints = function.__annotations__
    for name, hint in list(hints.items()):
        if _mentions_arrays(hint):
            hints[name] = _widened(hint)
        else:
            del hints[name]
    return _CHECK(function) if hints else function
