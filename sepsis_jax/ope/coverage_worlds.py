"""Worlds whose true values are known, and data sets drawn from them, for counts of coverage.

Policies mix the clinician with a better policy (the optimal one where states are discrete,
titration in the synthetic world) and with a uniform one; the share of the other policy is the
distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, softmax

from policy.base import action_probs
from sepsis_jax.ope.benchmark import HIDDEN, Seen, mixed, partly, sample, whole
from sepsis_jax.ope.data import OPEData, from_episodes
from sepsis_jax.ope.fqe import key_features
from worldmodel import schema
from worldmodel.envs import gumbel_max
from worldmodel.envs.icu_sepsis import icu_sepsis
from worldmodel.envs.tables import MDP
from worldmodel.envs.tables import true_value as exact_value
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.synthetic import Params, generate, true_value

WORLDS, CLINICIANS = ("icu_sepsis", "synthetic", "gumbel_max"), ("true", "fitted")
HORIZON = 20  # steps


@dataclass(frozen=True)
class Cell:
    """A setting.

    Attributes:
      world: "icu_sepsis", "synthetic" or "gumbel_max".
      clinician: "true" or "fitted".
      stays: per data set.
      dial: of confounding in the synthetic world: how far the clinician follows what is hidden. In
        the gumbel-max simulator diabetes and glucose are hidden above 0.
    """

    world: str
    clinician: str
    stays: int
    dial: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("world", WORLDS), ("clinician", CLINICIANS)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )
        if self.stays < 20 or (self.dial and self.world == "icu_sepsis"):
            raise InputError(
                f"stays, dial: got {self.stays}, {self.dial}; expected at least 20 "
                "stays, and no confounding in ICU-Sepsis"
            )


class Truth(NamedTuple):
    """Values by policy, and the clinician's."""

    policies: Mapping[str, float]
    clinician: float


class Drawn(NamedTuple):
    """Stays of several data sets, one after the other."""

    data: OPEData  # the clinician's probabilities are the true ones
    probs: dict[str, np.ndarray]
    state: np.ndarray | None  # [N, T] recorded, where states are discrete
    inputs: np.ndarray  # [N, T, D] of the fitted clinician

    def part(self, rows: slice) -> Drawn:
        """Some of the stays, on the host."""
        data: OPEData = jax.tree.map(lambda leaf: leaf[rows], self.data)
        probs = {name: table[rows] for name, table in self.probs.items()}
        state = None if self.state is None else self.state[rows]
        return Drawn(data, probs, state, self.inputs[rows])


def labels(distances: tuple[float, ...]) -> dict[str, tuple[bool, float]]:
    """Whether a policy mixes in the better one, and its distance, by name."""
    return {
        f"{'better' if better else 'uniform'} {share:g}": (better, share)
        for share in distances
        for better in (True, False)
    }


class Tables(NamedTuple):
    """A process with discrete states, what is recorded of it, and inputs of a fitted clinician."""

    world: MDP
    seen: Seen
    inputs: np.ndarray  # [S, D]

    def policies(self, distances: tuple[float, ...]) -> dict[str, np.ndarray]:
        """[S, A] policies by name."""
        return {
            name: self.seen.mixed(share, better)
            for name, (better, share) in labels(distances).items()
        }


def tables(cell: Cell) -> Tables | None:
    """The process of a cell; None for the synthetic world."""
    return None if cell.world == "synthetic" else _tables(cell.world, cell.dial > 0)


@cache
def _tables(name: str, hidden: bool) -> Tables:
    if name == "icu_sepsis":
        world = icu_sepsis()
        assert world.sofa is not None
        inputs = np.stack([np.ones_like(world.sofa), world.sofa / 10], -1)
        return Tables(world, whole(world), inputs)
    world = gumbel_max.gumbel_max()
    variables = HIDDEN if hidden else ()
    seen = whole(world)
    if hidden:
        seen = partly(world, gumbel_max.visible(variables), HORIZON)
    columns = [np.ones((gumbel_max.NUM_STATES, 1))]
    for variable, levels in gumbel_max.LEVELS.items():
        if variable not in variables:
            others = tuple(other for other in gumbel_max.LEVELS if other != variable)
            columns.append(np.eye(levels)[gumbel_max.visible(others)[0]][:, 1:])
    return Tables(world, seen, np.concatenate(columns, 1))


def _synthetic_policies(distances: tuple[float, ...]) -> dict[str, jax.tree_util.Partial]:
    clinician = Params().clinician
    return {
        name: jax.tree_util.Partial(mixed, jnp.float32(share), jnp.bool_(better), clinician)
        for name, (better, share) in labels(distances).items()
    }


def truth(cell: Cell, distances: tuple[float, ...], *, patients: int, seed: int) -> Truth:
    """True values: exact where states are discrete, else of `patients` simulated stays."""
    known = tables(cell)
    if known is not None:
        values = {
            name: exact_value(known.world, policy, horizon=HORIZON)
            for name, policy in known.policies(distances).items()
        }
        return Truth(values, exact_value(known.world, known.world.clinician, horizon=HORIZON))
    params = _params(cell)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    values = {
        name: true_value(key, policy, patients, params=params).value
        for name, policy in _synthetic_policies(distances).items()
    }
    return Truth(values, true_value(key, None, patients, params=params).value)


def _params(cell: Cell) -> Params:
    params = Params()
    return replace(params, clinician=replace(params.clinician, confounding=cell.dial))


def draw(cell: Cell, first: int, count: int, distances: tuple[float, ...], seed: int) -> Drawn:
    """The data sets first ... first + count - 1 of a cell; any part is the same in every run."""
    stays = count * cell.stays
    known = tables(cell)
    if known is not None:
        drawn = sample(known.world, stays, horizon=HORIZON, seed=(seed, cell.stays, first))
        probs = {name: drawn.probs(policy) for name, policy in known.policies(distances).items()}
        data = drawn.under(known.seen.clinician[known.seen.number])
        return Drawn(
            jax.tree.map(np.asarray, data), probs, known.seen.number[drawn.state],
            known.inputs[drawn.state].astype(np.float32),
        )  # fmt: skip
    key = jax.random.fold_in(jax.random.key(seed), 2)
    episodes, hidden = generate(
        key, stays, params=_params(cell), keep_latent=False, first_patient=first * cell.stays
    )
    data = from_episodes(
        episodes, behavior_probs=hidden.probabilities, features=key_features(episodes)
    )
    probs = {
        name: np.asarray(action_probs(policy, episodes, key=key))
        for name, policy in _synthetic_policies(distances).items()
    }
    return Drawn(jax.tree.map(np.asarray, data), probs, None, _seen(episodes))


def _seen(episodes: Episodes) -> Float[np.ndarray, "N T D"]:
    """[N, T, D] what the clinician of the synthetic world looks at."""
    valid = np.asarray(episodes.valid)
    dynamic = np.where(valid[..., None], np.asarray(episodes.dynamic, np.float64), 1.0)
    pressure, lactate, urine = (
        dynamic[..., schema.INDEX[name]] for name in ("meanbp", "lactate", "output_4hourly")
    )
    oxygen = 100 * dynamic[..., schema.INDEX["pao2"]] / dynamic[..., schema.INDEX["fio2"]]
    step = np.broadcast_to(np.arange(episodes.num_steps), pressure.shape)
    levels = np.stack([np.asarray(episodes.vasopressor), np.asarray(episodes.fluid)], -1)
    before = np.concatenate([np.zeros_like(levels[:, :1]), levels[:, :-1]], 1)
    indicators = np.eye(schema.NUM_LEVELS)[before][..., 1:].reshape(*pressure.shape, -1)
    columns = [
        np.ones_like(pressure), np.clip(68 - pressure, 0, 30) / 10,
        np.clip(pressure - 68, 0, 30) / 10, np.clip(lactate - 2, 0, 6), np.clip(lactate - 2, 0, 4),
        expit((66 - pressure) / 3), expit((120 - urine) / 40), expit((180 - oxygen) / 30),
        np.exp(-step / 4), step == 0,
        (before[..., 0] == 0) * np.clip(67 - pressure, 0, 15) / 10,
    ]  # fmt: skip
    inputs = np.concatenate([np.stack(columns, -1), indicators], -1)
    seen: np.ndarray = np.where(valid[..., None], inputs, 0).astype(np.float32)
    return seen


_FOLDS = 5
_PRIOR = 5.0  # rows that a state's counts shrink by
_LAPSE = 0.002  # least probability of an action, as the synthetic clinician has it


def fitted_stays(stays: int) -> int:
    """How many of so many stays each fit of `cross_fit` sees."""
    return stays - stays // _FOLDS


def cross_fit(cell: Cell, drawn: Drawn, rng: np.random.Generator) -> Float[np.ndarray, "N T A"]:
    """[N, T, A] probabilities of each stay from a fit to the other folds."""
    alive, action = np.asarray(drawn.data.alive), np.asarray(drawn.data.action)
    fold = rng.permutation(len(alive)) % _FOLDS
    known = tables(cell)
    actions = schema.NUM_ACTIONS if known is None else known.seen.best.shape[1]
    out = np.empty((*alive.shape, actions), np.float32)
    for f in range(_FOLDS):
        used = alive & (fold != f)[:, None]
        if known is not None and drawn.state is not None:
            state, size = drawn.state, known.seen.best.shape
            out[fold == f] = _counts(state[used], action[used], size)[state[fold == f]]
            continue
        out[fold == f] = joint_probabilities(
            drawn.inputs[fold == f], *fit_levels(drawn.inputs[used], action[used])
        )
    return out


def _counts(
    state: Int[np.ndarray, " M"], action: Int[np.ndarray, " M"], size: tuple[int, ...]
) -> Float[np.ndarray, "S A"]:
    """Counts of actions by state, shrunk to their overall frequency."""
    counts = np.zeros(size)
    np.add.at(counts, (state, action), 1.0)
    overall = (counts.sum(0) + 1) / (counts.sum() + size[1])
    counts += _PRIOR * overall
    found: np.ndarray = counts / counts.sum(1, keepdims=True)
    return found


def joint_probabilities(
    x: Float[np.ndarray, "*M D"], *thetas: Float[np.ndarray, "D L"]
) -> Float[np.ndarray, "*M A"]:
    """Probabilities of joint actions from the coefficients of `fit_levels`, lapses included."""
    vasopressor, fluid = (softmax(x @ theta, axis=-1) for theta in thetas)
    joint = vasopressor[..., :, None] * fluid[..., None, :]
    joint = joint.reshape(*joint.shape[:-2], schema.NUM_ACTIONS)
    found: np.ndarray = (1 - schema.NUM_ACTIONS * _LAPSE) * joint + _LAPSE
    return found


def fit_levels(
    x: Float[np.ndarray, "M D"],
    action: Int[np.ndarray, " M"],
    *,
    ridge: float = 0.03,
    steps: int = 12,
) -> list[Float[np.ndarray, "D L"]]:
    """Coefficients of both drugs' multinomial logistic regressions, by likelihood.

    An action is a lapse, drawn uniformly, with a known probability. Each round of
    expectation-maximisation weighs rows by the probability that they are none, and makes one step
    of Newton's method. Level 0 has no coefficients.
    """
    x = x.astype(np.float64)
    levels = np.divmod(action, schema.NUM_LEVELS)
    thetas = [np.zeros((x.shape[1], schema.NUM_LEVELS)) for _ in levels]
    for _ in range(steps):
        probs = [softmax(x @ theta, axis=-1) for theta in thetas]
        taken = [p[np.arange(len(x)), level] for p, level in zip(probs, levels, strict=True)]
        meant = (1 - schema.NUM_ACTIONS * _LAPSE) * taken[0] * taken[1]
        weight = meant / (meant + _LAPSE)
        for theta, p, level in zip(thetas, probs, levels, strict=True):
            theta[:, 1:] += _newton_step(x, level, p, weight, theta, ridge)
    return thetas


def _newton_step(
    x: np.ndarray,
    level: np.ndarray,
    probs: np.ndarray,
    weight: np.ndarray,
    theta: np.ndarray,
    ridge: float,
) -> np.ndarray:
    """[D, L - 1] step towards the maximum of the weighted, penalised likelihood."""
    width, classes = x.shape[1], schema.NUM_LEVELS
    size = width * (classes - 1)
    residual = weight[:, None] * (np.eye(classes)[level] - probs)
    slope = (x.T @ residual)[:, 1:] - ridge * theta[:, 1:]
    hessian = np.empty((width, classes - 1, width, classes - 1))
    for i in range(1, classes):
        for j in range(i, classes):
            spread = weight * probs[:, i] * ((i == j) - probs[:, j])
            block = x.T @ (x * spread[:, None])
            hessian[:, i - 1, :, j - 1] = hessian[:, j - 1, :, i - 1] = block
    flat = hessian.reshape(size, size) + ridge * np.eye(size)
    step: np.ndarray = np.linalg.solve(flat, slope.reshape(-1)).reshape(width, -1)
    return step
