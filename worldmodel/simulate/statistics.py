"""Summaries of branches, folded step by step, and statistics over the samples of a group."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from worldmodel import schema, struct
from worldmodel.clinical import reward
from worldmodel.clinical.reward import TERMINAL
from worldmodel.simulate.unroll import Shape, Step

MAP_TARGET = 65.0  # mmHg

_MEANBP = schema.INDEX["meanbp"]
_LEAST_WEIGHT = 1e-9  # where no stay reaches a row, all samples count alike
_FEWEST_STEPS = 1e-6  # where no row is reached


@struct.dataclass
class BranchSummary:
    """Summary of branches [P, K, S]; sums and means are over the H simulated steps.

    In the recurrent variant steps count by the probability that the stay has not ended: rows by
    that of reaching them, treatments by that of the row in which they begin.
    """

    final: jax.Array  # [P, K, S, F] physical units of the chosen features, in the last row
    sofa: jax.Array  # [P, K, S] in the last row
    lowest_map: jax.Array  # [P, K, S] mmHg
    below_target: jax.Array  # [P, K, S] share of steps with MAP < 65 mmHg
    ventilation: jax.Array  # [P, K, S] mean probability
    shaping: jax.Array  # [P, K, S] sum of the steps' rewards
    first_action: jax.Array  # [P, K, S] int32 joint action
    vasopressor: jax.Array  # [P, K, S] mean level
    fluid: jax.Array  # [P, K, S] mean level
    projected: jax.Array  # [P, K, S] int32 entries moved into their physiologic range
    mortality: jax.Array  # [P, K, S] probability of death within 90 days; NaN if not computed
    # Recurrent variant only, NaN otherwise:
    alive: jax.Array  # [P, K, S] probability that the stay reaches the last row
    reached: jax.Array  # [P, K, S] expected number of rows
    treated: jax.Array  # [P, K, S] expected number of treatments
    support: jax.Array  # [P, K, S] least probability of a step under the clinician
    later_reward: jax.Array  # [P, K, S] rewards after the horizon; 0 for the other variants

    @property
    def total_reward(self) -> jax.Array:
        """[P, K, S] shaping plus the expected terminal reward."""
        return self.shaping + self.later_reward + reward.terminal_reward(self.mortality)


def empty_summary(shape: Shape, features: tuple[str, ...]) -> BranchSummary:
    """The summary before the first step."""

    def full(value: float) -> jax.Array:
        return jnp.full(shape, value, jnp.float32)

    return BranchSummary(
        final=jnp.zeros((*shape, len(features))),
        sofa=full(0),
        lowest_map=full(jnp.inf),
        below_target=full(0),
        ventilation=full(0),
        shaping=full(0),
        first_action=jnp.full(shape, -1, jnp.int32),
        vasopressor=full(0),
        fluid=full(0),
        projected=jnp.zeros(shape, jnp.int32),
        mortality=full(jnp.nan),
        alive=full(jnp.nan),
        reached=full(0),
        treated=full(0),
        support=full(jnp.nan),
        later_reward=full(0),
    )


def fold_step(summary: BranchSummary, step: Step, features: tuple[str, ...]) -> BranchSummary:
    """The summary with one step added; sums, not yet means."""
    columns = np.array([schema.INDEX[name] for name in features], np.int32)
    map_ = step.dynamic[..., _MEANBP]
    here: jax.Array | float = 1.0
    before: jax.Array | float = 1.0
    if step.alive is not None and step.support is not None:
        here, before = step.alive, jnp.where(jnp.isnan(summary.alive), 1.0, summary.alive)
        summary = replace(
            summary,
            alive=jnp.broadcast_to(step.alive, summary.alive.shape),
            support=jnp.fmin(summary.support, step.support),
        )
    vasopressor, fluid = schema.action_levels(step.action)
    return replace(
        summary,
        final=jnp.broadcast_to(step.dynamic[..., columns], summary.final.shape),
        sofa=jnp.broadcast_to(step.sofa, summary.sofa.shape),
        lowest_map=jnp.minimum(summary.lowest_map, map_),
        below_target=summary.below_target + here * (map_ < MAP_TARGET),
        ventilation=summary.ventilation + here * step.ventilation,
        reached=summary.reached + here,
        treated=summary.treated + before,
        shaping=summary.shaping + step.reward,
        first_action=jnp.where(summary.first_action < 0, step.action, summary.first_action),
        vasopressor=summary.vasopressor + before * vasopressor,
        fluid=summary.fluid + before * fluid,
        projected=summary.projected + step.projected,
    )


def finish_summary(
    summary: BranchSummary,
    mortality: jax.Array | None,
    later_reward: jax.Array | None = None,
) -> BranchSummary:
    """The final summary: sums become means, and mortality is added."""
    reached = jnp.maximum(summary.reached, _FEWEST_STEPS)
    return replace(
        summary,
        below_target=summary.below_target / reached,
        ventilation=summary.ventilation / reached,
        vasopressor=summary.vasopressor / summary.treated,
        fluid=summary.fluid / summary.treated,
        mortality=summary.mortality if mortality is None else mortality,
        later_reward=summary.later_reward if later_reward is None else later_reward,
    )


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CLEARED = 0.2  # of lactate, a common target of resuscitation (Jones et al., JAMIA 303:739)
Columns = dict[str, np.ndarray]


def group_statistics(
    summary: BranchSummary,
    start_values: Float[np.ndarray, "P F"],
    start_sofa: Float[np.ndarray, " P"],
    *,
    features: tuple[str, ...],
    members: int,
    horizon: int,
    mode: str = "corrected",
) -> Columns:
    """Statistics over samples, in float64; NaN where there is none.

    Those of the last row count samples by the probability that the stay reaches it.

    Args:
      summary: NumPy leaves [P, K, S, ...].
      start_values: [P, F] the features in the row that the branches start from.
      start_sofa: [P] likewise.
      features: names of the F features.
      members: ensemble size E; sample s is of member s mod E.
      horizon: steps H.
      mode: in "reference" a mortality above 0.5 is death, as far as the reward is concerned.

    Returns:
      Columns [P, K] by name; `docs/sweeps.md` describes them.
    """
    values = {name: _wide(summary.final[..., i]) for i, name in enumerate(features)}
    start = dict(zip(features, np.asarray(start_values, np.float64).T, strict=True))
    mortality = _wide(summary.mortality)
    died = mortality
    if mode == "reference":
        died = np.where(np.isnan(mortality), np.nan, mortality > 0.5)
    reward = _wide(summary.shaping) + TERMINAL * (1.0 - 2.0 * died) + _wide(summary.later_reward)
    shape = mortality.shape[:2]
    weight = None if np.isnan(summary.alive).all() else weights_of(summary.alive)

    columns: Columns = {}
    for name in features:
        columns[f"{name}_start"] = np.broadcast_to(start[name][:, None], shape)
        columns |= _spread(name, values[name], weight)
        columns[f"{name}_disagreement"] = disagreement(values[name], members, weight)
    columns["sofa_start"] = np.broadcast_to(np.asarray(start_sofa, np.float64)[:, None], shape)
    columns |= _spread("sofa", _wide(summary.sofa), weight)
    columns["sofa_change"] = columns["sofa_mean"] - columns["sofa_start"]
    for name, found in (("mortality", mortality), ("reward", reward)):
        columns |= _spread(name, found)
        columns[f"{name}_disagreement"] = disagreement(found, members)
        columns[f"{name}_se"] = standard_error(found, members)
    columns["map_below_65"] = _wide(summary.below_target).mean(-1)
    columns["map_ever_below_65"] = (_wide(summary.lowest_map) < MAP_TARGET).mean(-1)
    if "lactate" in features:
        with np.errstate(divide="ignore", invalid="ignore"):
            cleared = 1.0 - values["lactate"] / start["lactate"][:, None, None]
        columns["lactate_clearance"] = np.average(cleared, -1, weight)
        columns["lactate_cleared_20"] = np.average(cleared >= CLEARED, -1, weight)
    columns["ventilation"] = _wide(summary.ventilation).mean(-1)
    columns["vasopressor_level"] = _wide(summary.vasopressor).mean(-1)
    columns["fluid_level"] = _wide(summary.fluid).mean(-1)
    entries = horizon * schema.NUM_FEATURES
    columns["projected_share"] = _wide(summary.projected).mean(-1) / entries
    columns["in_unit"] = _wide(summary.alive).mean(-1)
    columns["plan_support"] = _wide(summary.support).mean(-1)
    return columns


def disagreement(
    values: Float[np.ndarray, "P K S"],
    members: int,
    weight: Float[np.ndarray, "P K S"] | None = None,
) -> Float[np.ndarray, "P K"]:
    """[P, K] standard deviation between the members' (weighted) means; NaN for one member."""
    if members < 2:
        return np.full(values.shape[:2], np.nan)
    weights = None if weight is None else _by_member(weight, members)
    means = np.average(_by_member(values, members), 2, weights)
    result: np.ndarray = means.std(-1, ddof=1)
    return result


def standard_error(values: Float[np.ndarray, "P K S"], members: int) -> Float[np.ndarray, "P K"]:
    """[P, K] of the mean over samples, given the ensemble; NaN for one sample per member."""
    own = values.shape[-1] // members
    if own < 2:
        return np.full(values.shape[:2], np.nan)
    within = _by_member(values, members).var(2, ddof=1).mean(-1)
    result: np.ndarray = np.sqrt(within / values.shape[-1])
    return result


def plan_support(support: Float[np.ndarray, "P K S H"]) -> Float[np.ndarray, "P K"]:
    """[P, K] least probability of a step under the clinician, mean over samples.

    Positivity has to hold in every step: a treatment that is started against all habits and then
    held is not supported, although its later steps are expected once it is running.

    Args:
      support: `Rollouts.support`.
    """
    result: np.ndarray = _wide(support).min(-1).mean(-1)
    return result


def first_actions(summary: BranchSummary) -> Float[np.ndarray, "P K"]:
    """[P, K] float64 joint action of the first step; NaN where samples differ."""
    first = np.asarray(summary.first_action)
    return np.where((first == first[..., :1]).all(-1), first[..., 0], np.nan)


def support(
    probs: Float[np.ndarray, "P 25"] | None, summary: BranchSummary
) -> Float[np.ndarray, "P K"]:
    """[P, K] probability that the behaviour policy gives the first action; mean over samples.

    Args:
      probs: [P, 25] of the behaviour policy in the start rows; None for NaN everywhere.
      summary: leaves [P, K, S].
    """
    first = np.asarray(summary.first_action)
    if probs is None:
        return np.full(first.shape[:2], np.nan)
    rows = np.arange(len(first))[:, None, None]
    result: np.ndarray = np.asarray(probs, np.float64)[rows, first].mean(-1)
    return result


def weights_of(alive: np.ndarray | jax.Array) -> np.ndarray:
    """Weights of samples from the probabilities, of any shape, that their stays reach a row."""
    result: np.ndarray = np.maximum(_wide(alive), _LEAST_WEIGHT)
    return result


def spread(values: np.ndarray, weight: np.ndarray | None = None) -> Columns:
    """Mean and quantiles (`mean`, `q05` ...) over the last axis, which may have weights."""
    found = {"mean": np.average(values, -1, weight)}
    if weight is None:
        quantiles = np.quantile(values, QUANTILES, axis=-1)
    else:
        quantiles = weighted_quantiles(values, weight)
    return found | {f"q{round(100 * q):02d}": quantiles[i] for i, q in enumerate(QUANTILES)}


def weighted_quantiles(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[Q, ...] quantiles `QUANTILES` over the last axis: the smallest value that has its share."""
    order = np.argsort(values, axis=-1)
    ordered = np.take_along_axis(values, order, axis=-1)
    share = np.cumsum(np.take_along_axis(weight, order, axis=-1), axis=-1)
    share /= share[..., -1:]
    # Rounding may leave the last share below 1.
    index = [np.minimum((share < q - 1e-12).sum(-1), values.shape[-1] - 1) for q in QUANTILES]
    return np.stack([np.take_along_axis(ordered, i[..., None], -1)[..., 0] for i in index])


def _wide(leaf: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(leaf, np.float64)


def _by_member(values: np.ndarray, members: int) -> np.ndarray:
    """[P, K, S] to [P, K, S / E, E]."""
    return values.reshape(*values.shape[:2], -1, members)


def _spread(name: str, values: np.ndarray, weight: np.ndarray | None = None) -> Columns:
    """`spread`, its columns named after the feature."""
    return {f"{name}_{column}": found for column, found in spread(values, weight).items()}
