"""What an estimated clinician does to an estimate: its bias and its error, corrected.

Let log b(a | s) move by theta' (x(s) u(a)), x the state's features and u the levels of the doses.
With z_t = x(s_t) (u(a_t) - E_b u) the score of a step, the log weight of step t moves by
-theta' (z_0 + ... + z_t), so every estimate V has a slope along theta. Probabilities that were
fitted by likelihood to m stays err by I^-1 mean(sum_t z_t), I being the information of a stay, and
V errs with them:

    cross-fitted on the evaluated stays:  influence_i + slope' I^-1 sum_t z_it
    fitted to m other stays:              variance + slope' I^-1 slope / m

The first line lowers the error of weighted estimates where the model is right, as estimated
propensities do (Hirano, Imbens & Ridder 2003). Its sum is what is left of the influences after P
directions were fitted to them, and too small for that: it is divided by the root of 1 - P / n, n
being the number of stays (HC1; MacKinnon & White 1985; the leverages of single stays, HC2, are so
unequal that intervals of 725 stays cover 0.99). Weights divide by what errs, so they are too large
in the mean, most where the clinician's choice was rare: by exp((z' I^-1 z + tr(I_0 + ... + I_t)
I^-1) / 2 m), z being the score up to the step and I_t the information of one, to second order.
`log_excess` is subtracted first. Errors of the clinician beyond these directions, and those of a
model that is wrong, are not corrected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from policy.clinician import fit_behavior
from sepsis_jax.ope.data import BLOCK, Inspected
from sepsis_jax.ope.estimators import Batch, columns, evaluate_means
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError

_RIDGE = 1e-3  # of the mean of the information's diagonal
_MOST_LEVERAGE = 0.9  # of P / n, so that few stays widen intervals and do not break them


@dataclass(frozen=True)
class ClinicianFit:
    """How the clinician's probabilities were estimated.

    Attributes:
      stays: number of stays that a fit has seen.
      shared: whether those are among the evaluated stays, cross-fitted.
    """

    stays: int
    shared: bool = False

    def __post_init__(self) -> None:
        if self.stays < 1:
            raise InputError(f"clinician fit: got {self.stays} stays, expected at least 1")


def cross_fit(
    key: jax.Array, episodes: Episodes, model: str, folds: int
) -> Float[np.ndarray, "N T 25"]:
    """[N, T, 25] probabilities of every stay by a model that saw no stay of its patient.

    Args:
      key: of folds and fits; consumed.
      episodes: all stays; their own splits are ignored.
      model: a name of `policy.clinician.MODELS`.
      folds: F; each fit leaves one out and calibrates on a fifth of the others.

    Raises:
      InputError: fewer patients than folds.
    """
    patients, place = np.unique(np.asarray(episodes.subject_id), return_inverse=True)
    if not 2 <= folds <= len(patients) // 3:
        raise InputError(
            f"behavior_folds: got {folds}, expected 2 to {len(patients) // 3}, a third of the "
            "patients"
        )
    fold_key, fit_key = jax.random.split(key)
    rank = np.asarray(jax.random.permutation(fold_key, len(patients)))[place]
    fold = rank % folds
    train, validation, test = (schema.SPLITS.index(n) for n in ("train", "validation", "test"))
    out = np.full((*episodes.valid.shape, schema.NUM_ACTIONS), 1 / schema.NUM_ACTIONS, np.float32)
    for f in range(folds):
        split = np.where(rank // folds % 5 == 0, validation, train)
        split = np.where(fold == f, test, split)
        part = replace(episodes, split=jnp.asarray(split, jnp.int32))
        found = fit_behavior(jax.random.fold_in(fit_key, f), part, models=(model,))[0]
        out[fold == f] = found.probs[fold == f]
    return out


class Correction(NamedTuple):
    """What becomes of influences and variances."""

    added: np.ndarray  # [N, K, E] to influences
    scale: np.ndarray  # [K, E] of the sums
    variance: np.ndarray  # [K, E] added to variances

    def of(self, influence: Float[np.ndarray, "N K E"]) -> Float[np.ndarray, "N K E"]:
        """Influences with the error of the clinician in them."""
        found: np.ndarray = (influence + self.added) * self.scale
        return found


class Scores(NamedTuple):
    """How the log-likelihood of the recorded doses moves along P directions of the clinician."""

    steps: np.ndarray  # [N, T, P], 0 after the end
    information: np.ndarray  # [P, P] of a stay, with a small ridge
    curvature: np.ndarray  # [N, T] trace of a step's information times the inverse of a stay's

    def moved(self) -> Float[np.ndarray, "N P"]:
        """Of whole stays."""
        total: np.ndarray = self.steps.sum(1, dtype=np.float64)
        return total


def scores_of(
    found: Inspected, index: np.ndarray, features: Float[np.ndarray, "N T D"] | None
) -> Scores:
    """Scores of stays along products of the state's features and indicators of dose levels.

    Args:
      found: inspected input.
      index: [N] numbers of the stays.
      features: [N, T, D] of the state, in the same order.

    Raises:
      InputError: no features, or only the probabilities of recorded actions.
    """
    if features is None or found.behavior is None:
        raise InputError(
            "clinician fit: the error of an estimated clinician needs `features` and the "
            "probabilities of all actions, `behavior_probs`"
        )
    basis = _indicators(found.behavior.given.shape[-1])
    width, size = features.shape[-1], basis.shape[1]
    pairs = [(i, j) for i in range(size) for j in range(i, size)]
    dose = np.empty((len(index), found.steps, size), np.float32)
    spread = np.empty((len(pairs), len(index) * found.steps), np.float32)  # covariances of doses
    for first in range(0, len(index), BLOCK):
        rows = slice(first, first + BLOCK)
        stays, probs = found.stays(index[rows]), found.behavior.of(index[rows], found.steps)
        on = np.asarray(stays.alive)[..., None]
        mean = probs @ basis
        dose[rows] = (basis[np.asarray(stays.action)] - mean) * on
        flat = slice(first * found.steps, (first + len(probs)) * found.steps)
        for place, (i, j) in enumerate(pairs):
            product = probs @ (basis[:, i] * basis[:, j]) - mean[..., i] * mean[..., j]
            spread[place, flat] = (product * on[..., 0]).reshape(-1)
    x = features.reshape(-1, width)
    total = np.zeros((width, size, width, size))
    for place, (i, j) in enumerate(pairs):
        total[:, i, :, j] = total[:, j, :, i] = x.T @ (x * spread[place][:, None])
    information = total.reshape(width * size, -1) / len(index)
    information += (_RIDGE * np.trace(information) / len(information) + 1e-12) * np.eye(
        len(information)
    )
    inverse = np.linalg.inv(information).reshape(total.shape)
    curvature = np.zeros(len(x))
    for place, (i, j) in enumerate(pairs):
        both = 1 if i == j else 2
        curvature += both * spread[place] * ((x @ inverse[:, i, :, j]) * x).sum(1)
    steps = np.einsum("ntd,ntj->ntdj", features, dose).reshape(*dose.shape[:2], -1)
    return Scores(steps, information, curvature.reshape(dose.shape[:2]))


def _indicators(actions: int) -> Float[np.ndarray, "A J"]:
    """Indicators of both drugs' levels above 0, or of all actions but the first."""
    if actions != schema.NUM_ACTIONS:
        return np.eye(actions, dtype=np.float32)[:, 1:]
    level = np.eye(schema.NUM_LEVELS, dtype=np.float32)[:, 1:]
    drugs = np.divmod(np.arange(actions), schema.NUM_LEVELS)
    return np.concatenate([level[each] for each in drugs], 1)


def correct(scores: Scores, batch: Batch, fit: ClinicianFit, names: tuple[str, ...]) -> Correction:
    """The correction of E estimators.

    Args:
      scores: of the stays of the batch, in its order.
      batch: weights and fitted ingredients.
      fit: how the clinician was estimated.
      names: estimators.
    """
    slope = np.asarray(_slopes(batch, names), np.float64)
    slope[:, is_clinician(np.asarray(batch.log_weight))] = 0.0
    return from_slopes(scores, slope, fit)


def is_clinician(log_weight: Float[np.ndarray, "K N T"]) -> Bool[np.ndarray, " K"]:
    """[K] which policies are the estimated clinician, whose weights are 1 however much it errs."""
    own: np.ndarray = (np.abs(log_weight) < 1e-5).all((1, 2))
    return own


def from_slopes(
    scores: Scores, slope: Float[np.ndarray, "E K N T"], fit: ClinicianFit
) -> Correction:
    """The correction of estimates with slopes [E, K, N, T] along the log weights of every step."""
    size = len(scores.information)
    # A ratio moves the log weights of its own step and of all later ones.
    later = np.nan_to_num(slope)[..., ::-1].cumsum(-1)[..., ::-1]
    rows = later.reshape(-1, later.shape[-2] * later.shape[-1])
    along = -(rows @ scores.steps.reshape(rows.shape[1], size))  # [E K, P]
    solved = np.linalg.solve(scores.information, along.T)  # [P, E K]
    shape, stays = slope.shape[:2], len(scores.steps)
    if fit.shared:
        each = scores.moved() @ solved
        influence = np.swapaxes((each - each.mean(0)).reshape(stays, *shape), 1, 2)
        weighted = (slope != 0).any((2, 3)).T  # [K, E], not the clinician's mean
        wider = 1.0 / np.sqrt(1.0 - min(size / stays, _MOST_LEVERAGE))
        return Correction(influence, np.where(weighted, wider, 1.0), np.zeros(influence.shape[1:]))
    variance = (along * solved.T).sum(-1).reshape(shape).T / fit.stays
    return Correction(np.zeros((stays, *variance.shape)), np.ones(variance.shape), variance)


def log_excess(scores: Scores, fit: ClinicianFit) -> Float[np.ndarray, "N T"]:
    """[N, T] log of how much too large the weights are in the mean, as the estimate errs.

    With errors theta, normal with variance I^-1 / m, a step's log weight errs by -theta' z, whose
    exponential has a mean above 1, and by half of theta' I_t theta, as probabilities sum to 1.

    Args:
      scores: of the stays.
      fit: how the clinician was estimated.
    """
    half = np.linalg.cholesky(np.linalg.inv(scores.information)).astype(np.float32)
    moved = (np.cumsum(scores.steps, 1) @ half).astype(np.float64)
    excess: np.ndarray = (moved**2).sum(-1) + scores.curvature.cumsum(1)
    return np.minimum(excess / (2 * fit.stays), 20.0)


@partial(jax.jit, static_argnames="names")
def _slopes(batch: Batch, names: tuple[str, ...]) -> Float[Array, "E K N T"]:
    """Derivatives of the estimates by the log weights."""

    def values(log_weight: jax.Array) -> jax.Array:
        moved = replace(batch, log_weight=log_weight)
        means = {block: each.mean(1) for block, each in columns(moved, names).items()}
        return evaluate_means(means, moved, names).sum(0)

    _, pull = jax.vjp(values, batch.log_weight)
    found: jax.Array = jax.lax.map(lambda row: pull(row)[0], jnp.eye(len(names)))
    return found
