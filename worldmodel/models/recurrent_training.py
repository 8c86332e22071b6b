"""Data, loss and calibration of the recurrent variant.

A stay that ends in row t has told: no death and no discharge before, and its end. Records do not
tell deaths in the unit from deaths soon after, so the likelihood of the end is a mixture:

    P(goes on)    = (1 - d)(1 - r)
    P(ends, dead) = d + (1 - d) r q        P(ends, alive) = (1 - d) r (1 - q)

with r = 1 in the last row of the recorded window, where every stay ends (competing risks in
discrete time, Prentice & Gloeckler, Biometrics 34:57).

Outcomes are weighed as in marginal structural models (Robins, Hernan & Brumback, Epidemiology
11:550), so that past treatments tell what they did rather than whom they were given to.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from worldmodel import schema, struct
from worldmodel.clinical import reward
from worldmodel.episodes import Episodes
from worldmodel.imputation import hold_steps
from worldmodel.models.fitting import gaussian_nll
from worldmodel.models.recurrent import (
    DECAYS,
    DOSE_WIDTH,
    CompetingRisks,
    RecurrentStateModel,
    StayRow,
    add_doses,
    code_of,
    doses_of,
    row_inputs,
)
from worldmodel.models.windows import measured_entries, to_sequences
from worldmodel.models.world_model import WorldModel
from worldmodel.scaling import Scaler

Models = tuple[RecurrentStateModel, CompetingRisks]

_AUXILIARY_WEIGHT = 0.1  # of ventilation and of the clinician's choice, against the values
_OUTCOME_WEIGHT = 0.3  # of hazards and continuation
_REWARD_WEIGHT = 0.05  # of the squared error of the rewards to come
_WEIGHT_DECAY = 0.9  # per step, of what a treatment adds to the logarithm of later weights
_LOG_WEIGHT_LIMIT = 2.0
_FEWEST = 30  # measurements that a variance is estimated from
_SHRINKAGE = 50.0  # pairs of measurements at which a correlation is believed to one half


@struct.dataclass
class StayRows:
    """Whole stays in model space, [N, T, ...]; zero on padding."""

    inputs: jax.Array  # [N, T, F]
    obs: jax.Array  # [N, T, 39] z-scores
    measured: jax.Array  # [N, T, 39] bool
    action: jax.Array  # [N, T] int32
    ventilated: jax.Array  # [N, T] bool
    later_reward: jax.Array  # [N, T] rewards to come, without the terminal one
    length: jax.Array  # [N] int32
    died_90d: jax.Array  # [N] bool


def stay_row(
    obs: jax.Array,
    measured: jax.Array,
    ventilated: jax.Array,
    static: jax.Array,
    action: jax.Array,
    dose_edges: schema.DoseEdges,
    step: jax.Array,
) -> StayRow:
    """The rows of stays, with the doses before each.

    Args:
      obs, measured: [N, T, 39].
      ventilated: [N, T].
      static: [N, 3] scaled.
      action: [N, T] joint action 0-24, or -1 where there was no row.
      dose_edges: what the levels stand for.
      step: [N, T] int32, 0 at admission.
    """
    given = (action >= 0)[..., None]
    code = jnp.where(given, code_of(jnp.maximum(action, 0)), 0.0)
    doses = jnp.where(given, jnp.asarray(doses_of(dose_edges))[jnp.maximum(action, 0)], 0.0)

    def add(sums: jax.Array, dose: jax.Array) -> tuple[jax.Array, jax.Array]:
        return add_doses(sums, dose), sums

    start = jnp.zeros((action.shape[0], len(DECAYS) * DOSE_WIDTH))
    _, sums = jax.lax.scan(add, start, jnp.moveaxis(doses, 1, 0))
    return StayRow(
        obs=obs,
        measured=measured,
        ventilated=ventilated,
        step=step,
        static=static[:, None],
        before=jnp.pad(code[:, :-1], ((0, 0), (1, 0), (0, 0))),
        sums=jnp.moveaxis(sums, 0, 1),
    )


@partial(jax.jit, static_argnames="dose_edges")
def to_stay_rows(episodes: Episodes, scaler: Scaler, dose_edges: schema.DoseEdges) -> StayRows:
    """Recorded stays as the recurrent variant reads them."""
    recorded = to_sequences(episodes, scaler, padding=0)
    step = jnp.broadcast_to(jnp.arange(episodes.num_steps), recorded.action.shape)
    rows = stay_row(
        recorded.obs,
        recorded.measured,
        recorded.ventilated,
        recorded.static,
        recorded.action,
        dose_edges,
        step,
    )
    earned = reward.episode_rewards(episodes)
    shaping = jnp.where(step == episodes.length[:, None] - 1, 0.0, earned)
    return StayRows(
        inputs=row_inputs(rows),
        obs=recorded.obs,
        measured=recorded.measured,
        action=jnp.maximum(recorded.action, 0),
        ventilated=recorded.ventilated,
        later_reward=jnp.cumsum(shaping[:, ::-1], axis=1)[:, ::-1],
        length=recorded.length,
        died_90d=recorded.died_90d,
    )


def recurrent_loss(
    models: Models,
    rows: StayRows,
    index: jax.Array,
    key: jax.Array | None,
    *,
    weighted: bool = True,
) -> jax.Array:
    """Loss of whole stays: values, measuring, ventilation, choice, hazards, continuation.

    Args:
      models: of one member.
      rows: all stays.
      index: [B, 2], the first column being the stays of the batch.
      key: dropout when given; the key is consumed.
      weighted: whether outcomes have the weights of `history_weights`.
    """
    state_model, risks = models
    stay: StayRows = jax.tree.map(lambda leaf: leaf[index[:, 0]], rows)
    keys = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
    step = jnp.arange(stay.action.shape[1])
    valid = step < stay.length[:, None]
    goes_on = step[:-1] < stay.length[:, None] - 1
    read = state_model.read(stay.inputs, stay.obs, stay.action, key=keys[0])
    found = read.prediction

    measured = stay.measured[:, 1:] & goes_on[..., None]
    nll = gaussian_nll(stay.obs[:, 1:], found.mu[:, :-1], found.log_sigma[:, :-1])
    binary = optax.sigmoid_binary_cross_entropy
    vent = binary(found.vent_logit[:, :-1], stay.ventilated[:, 1:].astype(jnp.float32))
    taken = binary(found.measured_logit[:, :-1], stay.measured[:, 1:].astype(jnp.float32))
    entropy = optax.softmax_cross_entropy_with_integer_labels
    chosen, habitual = (entropy(logits, stay.action) for logits in (read.choice, read.habit))
    total = _mean(nll, measured) + _mean(taken.mean(-1), goes_on)
    total += _AUXILIARY_WEIGHT * (_mean(vent, goes_on) + _mean(chosen + habitual, valid))

    weight = history_weights(chosen, habitual, valid) if weighted else jnp.ones(valid.shape)
    logits = risks.risks(
        read.hidden, stay.inputs, jax.lax.stop_gradient(read.residual), key=keys[1]
    )
    later = risks.continuation(read.hidden, stay.inputs, key=keys[2])
    died = stay.died_90d[:, None]
    outcome = -_mean(weight * log_likelihood(logits, stay.length, died), valid)
    dead = binary(later.mortality_logit, jnp.broadcast_to(died, valid.shape).astype(jnp.float32))
    error = dead + _REWARD_WEIGHT * (later.reward - stay.later_reward) ** 2
    outcome += _mean(weight * error, valid)
    return total + _OUTCOME_WEIGHT * outcome


def history_weights(chosen: jax.Array, habitual: jax.Array, valid: jax.Array) -> jax.Array:
    """[B, T] weights of rows, of mean 1, under which past treatments are less confounded.

    Stabilised inverse-probability weights of the treatments before a row, the product over steps
    of p(a | treatment before, step) / p(a | history): patients whose record explains their
    treatment count less than those who were treated alike against it. Older treatments count less,
    and weights are bounded, which trades a part of the bias for variance. The treatment of the row
    itself enters as a residual, and so has no weight.

    Args:
      chosen: [B, T] negative log probability of the treatment given the whole history.
      habitual: [B, T] the same, given the treatment before and the step.
      valid: [B, T] bool, the row exists.
    """
    ratio = jax.lax.stop_gradient(chosen - habitual)

    def add(log_weight: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _WEIGHT_DECAY * (log_weight + ratio), log_weight

    _, log_weight = jax.lax.scan(add, jnp.zeros(ratio.shape[0]), ratio.T)
    weight = jnp.exp(jnp.clip(log_weight.T, -_LOG_WEIGHT_LIMIT, _LOG_WEIGHT_LIMIT))
    return weight / _mean(weight, valid)


def log_likelihood(logits: jax.Array, length: jax.Array, died: jax.Array) -> jax.Array:
    """[B, T] log probability of what each row's stay did: go on, or end dead or alive.

    Args:
      logits: [B, T, 3] of the competing risks; T is the length of the recorded window.
      length: [B] rows; rows at and after it have 0.
      died: [B, 1] bool, death within 90 days.
    """
    yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    steps = logits.shape[1]
    step = jnp.arange(steps)
    discharge = jnp.where(step == steps - 1, 0.0, yes[..., 1])
    dead = jnp.logaddexp(yes[..., 0], no[..., 0] + discharge + yes[..., 2])
    alive = no[..., 0] + discharge + no[..., 2]
    last = length[:, None] - 1
    return jnp.where(
        step == last,
        jnp.where(died, dead, alive),
        jnp.where(step < last, no[..., 0] + no[..., 1], 0.0),
    )


def _mean(values: jax.Array, use: jax.Array) -> jax.Array:
    return jnp.where(use, values, 0.0).sum() / jnp.maximum(use.sum(), 1)


def fill_values(episodes: Episodes, scaler: Scaler, step_hours: float) -> np.ndarray:
    """[39] z-scores that fill what was not measured within its hold time; 0 mL for urine.

    They are read off the rows of `episodes` in which nothing is held any more.
    """
    measured, valid = np.asarray(measured_entries(episodes)), np.asarray(episodes.valid)
    obs = np.asarray(scaler.normalize(episodes.dynamic))
    expired = (ages(measured) > held_rows(step_hours)) & valid[..., None]
    fill = np.array(scaler.normalize(np.zeros(schema.NUM_FEATURES, np.float32)))
    for j in range(schema.NUM_MASKED):
        use = expired[..., j] if expired[..., j].any() else valid
        fill[j] = np.median(obs[..., j][use])
    return fill


def ages(measured: np.ndarray) -> np.ndarray:
    """[N, T, 39] rows since the last measurement, infinite before the first."""
    step = np.arange(measured.shape[1])[None, :, None]
    last = np.maximum.accumulate(np.where(measured, step, -1), axis=1)
    result: np.ndarray = np.where(last >= 0, step - last, np.inf)
    return result


def held_rows(step_hours: float) -> np.ndarray:
    """[39] rows for which a value is held; 0 for urine, which is never held."""
    hold = hold_steps(step_hours).astype(np.float32)
    hold[schema.URINE] = 0.0
    result: np.ndarray = hold
    return result


def calibrate_noise(world_model: WorldModel, rows: StayRows) -> WorldModel:
    """Sets the covariance of the noise to that of the standardised errors of a split.

    Independent noise would lead a recurrent state to combinations of values that no patient has.
    Correlations of rare pairs are shrunk towards 0, and eigenvalues are kept positive.
    """
    state_model = jax.tree.map(lambda leaf: leaf, world_model.stay_models()[0])
    factors = []
    for member in range(world_model.num_members):
        one = jax.tree.map(lambda leaf, i=member: leaf[i], state_model)
        errors, measured = _standardised_errors(one, rows)
        factors.append(_factor(np.asarray(errors), np.asarray(measured)))
    state_model.noise_factor[...] = jnp.asarray(np.stack(factors), jnp.float32)
    return replace(world_model, state_model=state_model)


@jax.jit
def _standardised_errors(model: RecurrentStateModel, rows: StayRows) -> tuple[jax.Array, jax.Array]:
    found = model.read(rows.inputs, rows.obs, rows.action).prediction
    error = (rows.obs[:, 1:] - found.mu[:, :-1]) * jnp.exp(-found.log_sigma[:, :-1])
    following = jnp.arange(rows.action.shape[1] - 1) < rows.length[:, None] - 1
    return error, rows.measured[:, 1:] & following[..., None]


def _factor(errors: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """[39, 39] Cholesky factor of the covariance of errors [N, T, 39]."""
    features = errors.shape[-1]
    use = measured.reshape(-1, features)
    error = np.where(use, errors.reshape(-1, features), 0.0).astype(np.float64)
    count = use.sum(0)
    variance = np.where(count >= _FEWEST, (error**2).sum(0) / np.maximum(count, 1), 1.0)
    spread = np.sqrt(np.clip(variance, 1e-2, 1e2))
    error = np.clip(error / spread, -5.0, 5.0)
    pairs = use.T.astype(np.float64) @ use
    correlation = error.T @ error / np.maximum(pairs, 1) * pairs / (pairs + _SHRINKAGE)
    np.fill_diagonal(correlation, 1.0)
    values, vectors = np.linalg.eigh(correlation)
    correlation = (vectors * np.clip(values, 1e-3, None)) @ vectors.T
    scale = np.sqrt(np.diag(correlation))
    factor = np.linalg.cholesky(correlation / np.outer(scale, scale))
    result: np.ndarray = factor * spread[:, None]
    return result
