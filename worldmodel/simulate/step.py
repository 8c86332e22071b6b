"""One simulated step: predict, project into physiologic ranges, score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from worldmodel import schema
from worldmodel.clinical import reward, sofa
from worldmodel.models.clinical_model import Prediction
from worldmodel.models.world_model import WorldModel
from worldmodel.scaling import Scaler
from worldmodel.simulate.history import History

MODES = ("corrected", "reference")
LACTATE = schema.INDEX["lactate"]


class NextRow(NamedTuple):
    """A row drawn from a prediction; leading axes of any shape."""

    obs: jax.Array  # [..., 39] z-scores
    dynamic: jax.Array  # [..., 39] physical units
    ventilation: jax.Array  # [...] probability
    projected: jax.Array  # [...] int32 entries moved into range


class StepOutputs(NamedTuple):
    """Results of a simulated step, each [B]."""

    ventilation: jax.Array  # probability
    reward: jax.Array
    projected: jax.Array  # int32 entries moved into range


def advance(
    world_model: WorldModel,
    history: History,
    action: Int[Array, " B"],
    eps: Float[Array, "B 39"],
    *,
    mode: str,
) -> tuple[History, StepOutputs]:
    """One step of B branches in a world model of one member.

    Args:
      world_model: of ensemble size 1.
      history: branches, each about to be treated.
      action: [B] joint action 0-24.
      eps: [B, 39] standard normal noise.
      mode: "corrected" or "reference".
    """
    history = history.choose(action)
    prediction = world_model.transition(*history.window(schema.STATE_WINDOW))
    return follow(world_model, history, prediction, eps, mode=mode)


def follow(
    world_model: WorldModel,
    history: History,
    prediction: Prediction,
    eps: Float[Array, "B 39"],
    *,
    mode: str,
) -> tuple[History, StepOutputs]:
    """`advance` with the prediction given, for histories whose treatment is chosen."""
    row = next_row(world_model, prediction, eps, mode=mode)
    moved = history.append(row.obs, row.dynamic[:, schema.URINE], row.ventilation > 0.5)
    return score_moved(world_model, history, moved, row, mode=mode)


def score_moved(
    world_model: WorldModel, history: History, moved: History, row: NextRow, *, mode: str
) -> tuple[History, StepOutputs]:
    """Histories with the SOFA of the row that was appended, and the results of the step.

    Args:
      world_model: whose scaler and dose edges are used.
      history: [B] before the step, its treatment chosen.
      moved: with the row appended.
      row: the row.
      mode: "corrected" or "reference".
    """
    before = world_model.scaler.denormalize(history.obs[:, -1])
    score = score_row(
        world_model,
        row,
        history.action[:, -1],
        urine_before=history.urine.sum(-1),
        urine_24h=moved.urine_24h(),
        mode=mode,
    )
    step_reward = reward.step_reward(
        history.sofa, score, before[:, LACTATE], row.dynamic[:, LACTATE]
    )
    outputs = StepOutputs(row.ventilation, step_reward, row.projected)
    return replace(moved, sofa=score), outputs


@jax.named_scope("sampling")
def next_row(
    world_model: WorldModel, prediction: Prediction, eps: Float[Array, "*b 39"], *, mode: str
) -> NextRow:
    """Draws the next row from a prediction; leading axes broadcast.

    Args:
      world_model: whose scaler is used.
      prediction: of the row.
      eps: [..., 39] standard normal noise.
      mode: "corrected" (projected into physiologic ranges) or "reference".
    """
    obs = prediction.mu + jnp.exp(prediction.log_sigma) * eps
    projected = jnp.zeros(obs.shape[:-1], jnp.int32)
    if mode == "corrected":
        obs, projected = project(obs, world_model.scaler)
    dynamic = world_model.scaler.denormalize(obs)
    return NextRow(obs, dynamic, jax.nn.sigmoid(prediction.vent_logit), projected)


@jax.named_scope("scoring")
def score_row(
    world_model: WorldModel,
    row: NextRow,
    action: Int[Array, "*#b"],
    *,
    urine_before: Float[Array, "*#b"],
    urine_24h: Float[Array, "*#b"],
    mode: str,
) -> Float[Array, "*#b"]:
    """SOFA [...] of a drawn row.

    Args:
      world_model: whose dose edges turn levels into doses.
      row: the row.
      action: [...] joint action that led to it.
      urine_before: [...] mL in the 24 h before the row, unscaled; read in reference mode.
      urine_24h: [...] mL in the 24 h up to the row; read in corrected mode.
      mode: "corrected" or "reference".
    """
    vasopressor, _ = schema.action_levels(action)
    ventilated = row.ventilation > 0.5
    if mode == "reference":
        return sofa.reference(
            row.dynamic,
            ventilated=ventilated,
            vasopressor_level=vasopressor,
            urine_before=urine_before,
        ).total
    doses = jnp.asarray(schema.level_doses(world_model.dose_edges.vasopressor))
    return sofa.standard(
        row.dynamic,
        ventilated=ventilated,
        vasopressor_dose=doses[vasopressor],
        urine_24h=urine_24h,
    ).total


_SYSBP, _DIABP, _MEANBP = (schema.INDEX[name] for name in ("sysbp", "diabp", "meanbp"))


def physiologic_range(scaler: Scaler) -> tuple[jax.Array, jax.Array]:
    """[39] z-scores of the lowest and highest physiologic values."""
    return scaler.normalize(jnp.asarray(schema.LOW)), scaler.normalize(jnp.asarray(schema.HIGH))


_FAR = 3.0  # sigmas
# z - m(z) as a fraction of polynomials in m(z) = E[max(0, N(z, 1))], fitted for z from -1.5 to 3,
# where it is right to 0.006; highest power first.
_LESS = (-2.7256, 6.2099, 2.0448), (34.058, 5.2113, 15.531, 1.0)


def mean_before_projection(
    mu: Float[Array, "*b 39"], sigma: Float[Array, "*b 39"], scaler: Scaler
) -> Float[Array, "*b 39"]:
    """Means of normals that have the means `mu` once they are moved into the physiologic range.

    At the edge of a range (FiO2 of 21%, SpO2 of 100%, no urine) noise moves a value one way only.
    Without this, simulated values drift away from the edge, step by step.

    Args:
      mu: [..., 39] z-scores.
      sigma: [..., 39] standard deviations, z-scores.
      scaler: of these z-scores.

    Returns:
      [..., 39] z-scores; `mu` where the edge is three standard deviations away.
    """
    return mean_before_clipping(mu, sigma, *physiologic_range(scaler))


def mean_before_clipping(
    mu: jax.Array, sigma: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """`mean_before_projection` of arrays that broadcast, with the ends of the ranges given."""

    def within(distance: jax.Array) -> jax.Array:
        """The distance from the edge, in sigmas, at which a clipped normal has this mean one."""
        distance = jnp.clip(distance, 0.03, _FAR)
        above, below = (_polynomial(powers, distance) for powers in _LESS)
        return distance - above / below

    above, below = (mu - low) / sigma, (high - mu) / sigma
    mu = jnp.where(above < _FAR, low + sigma * within(above), mu)
    return jnp.where(below < _FAR, high - sigma * within(below), mu)


def _polynomial(powers: tuple[float, ...], x: jax.Array) -> jax.Array:
    # Scalars, unlike the array that `jnp.polyval` takes, may be constants of a Pallas kernel.
    total = jnp.full_like(x, powers[0])
    for power in powers[1:]:
        total = total * x + power
    return total


WHOLE = slice(schema.INDEX["gcs_eye"], schema.INDEX["gcs_motor"] + 1)  # features in whole steps
_ROUNDED = 1 / 12  # variance that rounding adds (Sheppard)


def logit_of_normal(normal: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Logits [...] of uniform numbers, from standard normals [...].

    Bowling et al., J. Ind. Eng. Manag. 2:114 (2009): within 1.4e-4 of the exact probability, and
    much cheaper than the normal distribution function.
    """
    return normal * (1.5976 + 0.07056 * jnp.square(normal))


def draw_whole(
    mu: Float[Array, "*#b 39"],
    mean: Float[Array, "*#b 39"],
    sigma: Float[Array, "*#b 39"],
    normal: Float[Array, "*#b 39"],
    scaler: Scaler,
) -> Float[Array, "*#b 3"]:
    """Draws of the features that have whole steps, the parts of the GCS.

    A part that hardly varies lies at one of the two whole numbers around its mean; others are
    rounded normals. Mean and variance are those of the prediction.

    Args:
      mu: [..., 39] predicted means, z-scores.
      mean: [..., 39] the same, from `mean_before_projection`.
      sigma: [..., 39] standard deviations, z-scores.
      normal: [..., 39] standard normals.
      scaler: of these z-scores.

    Returns:
      [..., 3] z-scores, before projection.
    """
    return whole_steps(
        *(leaf[..., WHOLE] for leaf in (mu, mean, sigma, normal, scaler.std, scaler.mean))
    )


def whole_steps(
    mu: jax.Array,
    mean: jax.Array,
    sigma: jax.Array,
    normal: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
) -> jax.Array:
    """`draw_whole` of arrays that broadcast, with standard deviation and mean of the scaler."""
    spread = sigma * scale
    wide = jnp.sqrt(jnp.maximum(jnp.square(spread) - _ROUNDED, 0.0))
    rounded = jnp.floor(mean * scale + shift + wide * normal + 0.5)  # Triton has no rounding
    points = mu * scale + shift
    lower = jnp.floor(points)
    either = lower + (jax.nn.sigmoid(logit_of_normal(normal)) > 1.0 - (points - lower))
    return (jnp.where(spread < 0.5, either, rounded) - shift) / scale


def in_whole_steps(dynamic: Float[Array, "*b 39"]) -> Float[Array, "*b 39"]:
    """Physical values [..., 39] whose GCS parts are whole, as bedside scales are."""
    return dynamic.at[..., WHOLE].set(jnp.round(dynamic[..., WHOLE]))


def project(
    obs: Float[Array, "*b 39"], scaler: Scaler
) -> tuple[Float[Array, "*b 39"], Int[Array, "*b"]]:
    """Moves each feature into its physiologic range and orders the blood pressures.

    Args:
      obs: [..., 39] z-scores.
      scaler: of these z-scores.

    Returns:
      The projected z-scores and the number of entries that moved, [...] int32.
    """
    projected = move_into_range(
        obs,
        *physiologic_range(scaler),
        scaler.mean,
        scaler.std,
        jnp.arange(schema.NUM_FEATURES),
        lambda values, index: values[..., index, None],
    )
    return projected, (projected != obs).sum(-1).astype(jnp.int32)


def move_into_range(
    obs: jax.Array,
    low: jax.Array,
    high: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    feature: jax.Array,
    pick: Callable[[jax.Array, int], jax.Array],
) -> jax.Array:
    """`project` with any axis of features.

    Args:
      obs: z-scores.
      low, high: z-scores of the ends of the ranges, which broadcast against `obs`.
      mean, std: of the scaler, likewise.
      feature: int32 numbers of the features, likewise.
      pick: `(values, index) -> values` of one feature, with its axis of size 1.
    """
    projected = jnp.clip(obs, low, high)
    limit = (pick(projected * std + mean, _MEANBP) - mean) / std
    projected = jnp.where(feature == _SYSBP, jnp.maximum(projected, limit), projected)
    return jnp.where(feature == _DIABP, jnp.minimum(projected, limit), projected)
