"""What `bench` and `profile` set up before they measure."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from sepsis_jax.benchmark.workload import untrained_model
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.clinical_model import PRECISIONS
from worldmodel.models.world_model import WorldModel, init_world_model
from worldmodel.simulate.sharded import use_every_core


def begin_devices() -> None:
    """Every core a device, and GPU memory shared with torch; to be called before JAX is used."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    use_every_core()


def model_to_measure(path: Path | None, precision: str | None) -> tuple[WorldModel, str]:
    """The first member of a model, at some precision, and what to call it.

    Args:
      path: folder of a world model; None for an untrained one.
      precision: of matrix products; None for the model's own.

    Raises:
      InputError: no such model or precision.
    """
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"--precision: got {precision!r}, expected one of {PRECISIONS}")
    if path is None:
        world_model = untrained_model(precision or "highest")
        what = "untrained, of the published shape (reference variant)"
    else:
        world_model = load_world_model(path).member(0)
        if precision is not None:
            world_model = _at(world_model, precision)
        what = f"{world_model.config.variant} variant from {path.name}, first member"
    return world_model, f"{what}, precision {world_model.config.precision}"


def _at(world_model: WorldModel, precision: str) -> WorldModel:
    """The same weights with all products at another precision."""
    config = replace(world_model.config, precision=precision)
    other = init_world_model(jax.random.key(0), world_model.scaler, config)

    def weights(ours: Any, theirs: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(theirs), jax.tree.leaves(ours))

    return replace(
        world_model,
        config=config,
        state_model=weights(world_model.state_model, other.state_model),
        outcome_model=weights(world_model.outcome_model, other.outcome_model),
    )
