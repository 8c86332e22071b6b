"""What `bench` and `profile` prepare: devices, the model, and the workload of every contender."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sepsis_jax.benchmark.hardware import Shape
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.clinical_model import PRECISIONS, ModelConfig
from worldmodel.models.world_model import WorldModel, init_world_model
from worldmodel.resources import require_memory
from worldmodel.scaling import published_scaler
from worldmodel.simulate.history import History, start_history
from worldmodel.simulate.sharded import use_every_core
from worldmodel.synthetic import generate

T = TypeVar("T")


def begin_devices() -> None:
    """Makes every CPU core a device and leaves GPU memory to torch; call before JAX is used."""
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
        raise InputError(f"precision: got {precision!r}, expected one of {PRECISIONS}")
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

    def weights(source: T, like: T) -> T:
        found: T = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(source))
        return found

    return replace(
        world_model,
        config=config,
        state_model=weights(world_model.state_model, other.state_model),
        outcome_model=weights(world_model.outcome_model, other.outcome_model),
    )


_POOL = 256  # distinct patients; further branches start from them again with other noise
_STEP = 2
_START_BYTES = 8192  # of a branch's own start, which contenders without sharing need


@dataclass(frozen=True)
class Workload:
    """A rollout to be timed.

    Attributes:
      world_model: of one member.
      start: P patients.
      plans: [P, K, H] int32 joint actions.
      shape: P, K, S.
      horizon: steps H.
      precision: of matrix products.
      kernel: as for `RolloutConfig`.
    """

    world_model: WorldModel
    start: History
    plans: np.ndarray
    shape: Shape
    horizon: int
    precision: str
    kernel: str = "auto"

    @property
    def steps(self) -> int:
        """Branch-steps in a run."""
        return self.shape.branches * self.horizon

    def flat(self) -> tuple[History, np.ndarray]:
        """One start per branch, [B], and its plan [B, H]."""
        patients, plans, samples = self.shape
        rows = np.repeat(np.arange(patients), plans * samples)
        start = jax.tree.map(lambda leaf: leaf[rows], self.start)
        given = np.broadcast_to(self.plans[:, :, None], (*self.shape, self.horizon))
        return start, given.reshape(-1, self.horizon)


def untrained_model(precision: str) -> WorldModel:
    """The reference variant in its published shape, with initial weights."""
    config = ModelConfig(variant="reference", precision=precision)
    return init_world_model(jax.random.key(1), published_scaler(), config)


def synthetic_stays(seed: int) -> Episodes:
    """Stays of synthetic patients that last longer than eight hours."""
    episodes, _ = generate(jax.random.key(seed), 2 * _POOL, keep_latent=False)
    stays = np.flatnonzero(np.asarray(episodes.length) > _STEP)[:_POOL]
    return episodes.select(stays)


def patient_pool(world_model: WorldModel, seed: int) -> History:
    """Synthetic patients, eight hours after admission."""
    return start_history(world_model, synthetic_stays(seed), _STEP)


def workload(
    world_model: WorldModel,
    pool: History,
    shape: Shape,
    horizon: int,
    *,
    seed: int,
    kernel: str = "auto",
) -> Workload:
    """Patients of the pool under random plans."""
    rows = np.arange(shape.patients) % pool.step.shape[0]
    start = jax.tree.map(lambda leaf: leaf[rows], pool)
    start = replace(start, patient=jnp.arange(shape.patients, dtype=jnp.int32))
    plans = np.random.default_rng(seed).integers(
        0, schema.NUM_ACTIONS, (shape.patients, shape.plans, horizon)
    )
    precision = world_model.config.precision
    return Workload(world_model, start, plans.astype(np.int32), shape, horizon, precision, kernel)


def require_branches(shape: Shape, horizon: int) -> None:
    """Refuses a workload that memory does not hold.

    Raises:
      InputError: it does not fit; the message gives the number of branches that does.
    """
    require_memory("branches", shape.branches, _START_BYTES + 64.0 * horizon)


def shape_of(branches: int, *, plans: int, samples: int) -> Shape:
    """Patients for so many branches.

    Raises:
      InputError: the branches are no multiple of plans x samples.
    """
    patients, rest = divmod(branches, plans * samples)
    if rest or not patients:
        raise InputError(
            f"branches: got {branches}, expected a multiple of {plans} plans x {samples} samples"
        )
    return Shape(patients, plans, samples)
