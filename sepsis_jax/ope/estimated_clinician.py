"""What an estimated clinician adds to the error of an estimate: an influence-function correction.

Let log b(a | s) move by theta' (x(s) u(a)), x the state's features and u those of the dose. With
z_t = x(s_t) (u(a_t) - E_b u) the score of a step, the log weight of step t moves by -theta' (z_0 +
... + z_t), so every estimate V has a slope along theta. Probabilities that were fitted by
likelihood to m stays err by I^-1 mean(sum_t z_t), I being the information of a stay, and V errs
with them:

    cross-fitted on the evaluated stays:  influence_i + slope' I^-1 sum_t z_it
    fitted to m other stays:              variance + slope' I^-1 slope / m

The first lowers the error of weighted estimates where the model is right, as estimated propensities
do (Hirano, Imbens & Ridder 2003). Errors of the clinician beyond these directions, and those of a
model that is wrong, are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from policy.clinician import fit_behavior
from sepsis_jax.ope.data import BLOCK, Inspected
from sepsis_jax.ope.estimators import Batch, columns, evaluate_means
from sepsis_jax.ope.fqe import action_basis
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError

_RIDGE = 1e-3  # of the mean of the information's diagonal


@dataclass(frozen=True)
class ClinicianFit:
    """How the clinician's probabilities were estimated.

    Attributes:
      stays: number of stays that they were fitted to.
      shared: whether those are the evaluated stays, cross-fitted.
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
    """What is added to influences and variances."""

    influence: np.ndarray  # [N, K, E]
    variance: np.ndarray  # [K, E]


def correct(
    found: Inspected,
    index: np.ndarray,
    features: Float[np.ndarray, "N T D"] | None,
    batch: Batch,
    fit: ClinicianFit,
    names: tuple[str, ...],
) -> Correction:
    """The correction of E estimators.

    Args:
      found: inspected input.
      index: [N] numbers of the stays, in the order of the batch.
      features: [N, T, D] of the state, in the same order.
      batch: weights and fitted ingredients.
      fit: how the clinician was estimated.
      names: estimators.

    Raises:
      InputError: no features, or only the probabilities of recorded actions.
    """
    if features is None or found.behavior is None:
        raise InputError(
            "clinician fit: the error of an estimated clinician needs `features` and the "
            "probabilities of all actions, `behavior_probs`"
        )
    slope = np.asarray(_slopes(batch, names), np.float64)
    return from_slopes(found, index, features, slope, fit)


def from_slopes(
    found: Inspected,
    index: np.ndarray,
    features: Float[np.ndarray, "N T D"],
    slope: Float[np.ndarray, "E K N T"],
    fit: ClinicianFit,
) -> Correction:
    """The correction of estimates with slopes [E, K, N, T] along the log weights of every step."""
    dose, information = _scores(found, index, features)
    size = len(information)
    # A ratio moves the log weights of its own step and of all later ones.
    later = np.nan_to_num(slope)[..., ::-1].cumsum(-1)[..., ::-1]
    rows = later.reshape(-1, later.shape[-2] * later.shape[-1])
    score = np.einsum("ntd,ntj->ntdj", features, dose).reshape(rows.shape[1], size)
    along = -(rows @ score)  # [E K, P]
    ridge = _RIDGE * np.trace(information) / size + 1e-12
    solved = np.linalg.solve(information + ridge * np.eye(size), along.T)  # [P, E K]
    shape = slope.shape[:2]
    if fit.shared:
        each = score.reshape(len(index), -1, size).sum(1) @ solved
        influence = np.swapaxes((each - each.mean(0)).reshape(len(index), *shape), 1, 2)
        return Correction(influence, np.zeros(influence.shape[1:]))
    variance = (along * solved.T).sum(-1).reshape(shape).T / fit.stays
    return Correction(np.zeros((len(index), *variance.shape)), variance)


def _scores(
    found: Inspected, index: np.ndarray, features: np.ndarray
) -> tuple[Float[np.ndarray, "N T J"], Float[np.ndarray, "P P"]]:
    """Centred features of the recorded doses, 0 after the end, and the information of a stay."""
    assert found.behavior is not None
    basis = action_basis(found.behavior.given.shape[-1])[:, 1:]  # a constant is no direction
    width, size = features.shape[-1], basis.shape[1]
    dose = np.empty((len(index), found.steps, size), np.float32)
    total = np.zeros((width, size, width, size))
    for first in range(0, len(index), BLOCK):
        rows = slice(first, first + BLOCK)
        stays, probs = found.stays(index[rows]), found.behavior.of(index[rows], found.steps)
        on = np.asarray(stays.alive)[..., None]
        mean = probs @ basis
        dose[rows] = (basis[np.asarray(stays.action)] - mean) * on
        x = (features[rows] * on).reshape(-1, width)
        mean = mean.reshape(-1, size)
        for i in range(size):
            for j in range(i, size):
                spread = probs.reshape(len(x), -1) @ (basis[:, i] * basis[:, j])
                spread = spread - mean[:, i] * mean[:, j]
                total[:, i, :, j] += x.T @ (x * spread[:, None])
                total[:, j, :, i] = total[:, i, :, j]
    return dose, total.reshape(width * size, -1) / len(index)


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
