"""Benchmark of all estimators against true values, over many data sets.

Three worlds: the synthetic patient (values by Monte Carlo, continuous state, confounding on a
dial), ICU-Sepsis (values by dynamic programming, discrete state) and the gumbel-max simulator (the
same, the whole state recorded or not). Target policies are mixtures of the clinician with a better
and a worse policy; the share of the other policy is the distance.

Recorded stays of decision processes with discrete states, and their exact values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from policy.base import action_probs
from policy.clinician import BehaviorConfig, fit_behavior
from sepsis_jax.ope.data import OPEData, check, from_episodes
from sepsis_jax.ope.estimators import Values
from sepsis_jax.ope.evaluate import evaluate
from sepsis_jax.ope.fitted import fit
from sepsis_jax.ope.fqe import key_features
from sepsis_jax.ope.hidden_state import expected_counts, learned, recorded, suggested
from worldmodel.envs import gumbel_max
from worldmodel.envs.icu_sepsis import icu_sepsis
from worldmodel.envs.tables import MDP, best_policy, exact
from worldmodel.envs.tables import true_value as exact_value
from worldmodel.errors import InputError
from worldmodel.synthetic import Observation, Params, generate, random_policy, titration, true_value
from worldmodel.synthetic import clinician as clinicians

WORLDS = ("synthetic", "icu_sepsis", "gumbel_max", "all")
HIDDEN = ("diabetes", "glucose")  # in the gumbel-max simulator, as in its paper


@dataclass(frozen=True)
class BenchmarkOptions:
    """Settings.

    Attributes:
      world: "synthetic", "icu_sepsis", "gumbel_max" or "all".
      sizes: stays per data set.
      distances: shares of the other policy in the target policy.
      horizons: of processes with discrete states, in steps; the synthetic world has its own.
      confounding: dials of the synthetic world; above 0 the clinician's probabilities are fitted.
        In the gumbel-max simulator diabetes and glucose are hidden wherever a dial is above 0.
      repeats: data sets per setting.
      n_bootstrap: resamples.
      interval: method.
      truth_patients: of the synthetic world's true values.
      seed: of everything.
    """

    world: str = "all"
    sizes: tuple[int, ...] = (100, 300, 1000)
    distances: tuple[float, ...] = (0.05, 0.1, 0.3)
    horizons: tuple[int, ...] = (8, 20)
    confounding: tuple[float, ...] = (0.0, 0.5)
    repeats: int = 50
    n_bootstrap: int = 500
    interval: str = "adaptive_t"
    truth_patients: int = 40_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.world not in WORLDS:
            raise InputError(f"world: got {self.world!r}, expected one of {', '.join(WORLDS)}")
        for name in ("sizes", "distances", "horizons", "confounding"):
            if not getattr(self, name):
                raise InputError(f"{name}: expected at least one")
        if 0 not in self.confounding:
            raise InputError(
                f"confounding: got {self.confounding}, expected 0 among them: the summary is of "
                "settings without confounding"
            )
        if min(self.sizes) < 20 or self.repeats < 2:
            raise InputError(
                f"sizes, repeats: got {self.sizes}, {self.repeats}; expected at least 20 stays and "
                "2 data sets"
            )
        if not all(0 < share <= 1 for share in self.distances):
            raise InputError(f"distances: got {self.distances}, expected within (0, 1]")


class Pool(NamedTuple):
    """Stays of several data sets, one after the other, and the truth."""

    setting: Mapping[str, object]
    repeats: range  # numbers of the data sets
    data: OPEData
    probs: dict[str, jax.Array]  # by policy
    truth: dict[str, float]
    distance: dict[str, float]
    fitting: dict[str, Any]  # options of `fit`
    state: np.ndarray | None


def mixed(
    share: jax.Array,
    better: jax.Array,
    clinician: clinicians.ClinicianParams,
    key: jax.Array,
    observation: Observation,
) -> jax.Array:
    """[25] the clinician with a share of titration, or of uniform choices."""
    visible = clinicians.probabilities(observation, jnp.zeros(()), clinician)
    other = jnp.where(better, titration(key, observation), random_policy(key, observation))
    return (1 - share) * visible + share * other


def _parts(options: BenchmarkOptions, at_once: int | None) -> Iterator[tuple[range, int, int]]:
    """Numbers of the data sets of each pool, its first stay and how many stays it holds."""
    most, step = max(options.sizes), at_once or options.repeats
    for first in range(0, options.repeats, step):
        repeats = range(first, min(first + step, options.repeats))
        yield repeats, first * most, len(repeats) * most


def synthetic_pools(options: BenchmarkOptions, at_once: int | None = None) -> Iterator[Pool]:
    """Pools by dial of confounding, each of `at_once` data sets (default: all)."""
    params = Params()
    key = jax.random.key(options.seed)
    targets, distance = {}, {}
    for share in options.distances:
        for better, name in ((True, "titration"), (False, "random")):
            label = f"{name} {share:g}"
            targets[label] = jax.tree_util.Partial(
                mixed, jnp.float32(share), jnp.bool_(better), params.clinician
            )
            distance[label] = share
    world_key, fit_key, truth_key = jax.random.split(key, 3)
    truth = {
        name: true_value(truth_key, policy, options.truth_patients).value
        for name, policy in targets.items()
    }
    for dial in dict.fromkeys(options.confounding):
        clinician = replace(params.clinician, confounding=dial)
        for repeats, first, stays in _parts(options, at_once):
            episodes, hidden = generate(
                world_key, stays, params=replace(params, clinician=clinician), keep_latent=False,
                first_patient=first,
            )  # fmt: skip
            behavior: np.ndarray | jax.Array = hidden.probabilities
            if dial > 0:
                config = BehaviorConfig(epochs=5)
                behavior = fit_behavior(fit_key, episodes, models=("mlp",), config=config)[0].probs
            probs = {
                name: jnp.asarray(action_probs(policy, episodes, key=fit_key))
                for name, policy in targets.items()
            }
            data = from_episodes(episodes, behavior_probs=behavior, features=key_features(episodes))
            setting = {"world": "synthetic", "confounding": dial, "horizon": data.num_steps}
            yield Pool(setting, repeats, data, probs, truth, distance, {"method": "linear"}, None)


def icu_sepsis_pools(options: BenchmarkOptions, at_once: int | None = None) -> Iterator[Pool]:
    """Pools by horizon, each of `at_once` data sets (default: all)."""
    world = icu_sepsis()
    for horizon in dict.fromkeys(options.horizons):
        seen = whole(world)
        setting = {"world": "icu_sepsis", "confounding": 0.0, "horizon": horizon}
        yield from _table_pools(world, seen, setting, horizon, options, at_once)


def gumbel_max_pools(options: BenchmarkOptions, at_once: int | None = None) -> Iterator[Pool]:
    """Pools by horizon, with the whole state recorded (confounding 0) or part of it hidden (1).

    Where it is hidden, policies and the clinician are those of the recorded part (`partly`).
    """
    world = gumbel_max.gumbel_max()
    for horizon in dict.fromkeys(options.horizons):
        for hidden in dict.fromkeys(dial > 0 for dial in options.confounding):
            seen = whole(world)
            if hidden:
                seen = partly(world, gumbel_max.visible(HIDDEN), horizon)
            setting = {"world": "gumbel_max", "confounding": float(hidden), "horizon": horizon}
            yield from _table_pools(world, seen, setting, horizon, options, at_once)


class Seen(NamedTuple):
    """What is recorded of a process with discrete states, and policies of it."""

    number: np.ndarray  # [S] recorded state of each state
    clinician: np.ndarray  # [Z, A]
    best: np.ndarray  # [Z, A]

    def mixed(self, share: float, better: bool) -> Float[np.ndarray, "S A"]:
        """[S, A] the clinician with a share of the better policy, or of a uniform one."""
        other = self.best if better else np.full_like(self.best, 1 / self.best.shape[1])
        found: np.ndarray = ((1 - share) * self.clinician + share * other)[self.number]
        return found


def whole(world: MDP) -> Seen:
    """All is recorded; the better policy is the best of the process."""
    return Seen(np.arange(len(world.start)), world.clinician, best_policy(world))


def partly(world: MDP, visible: tuple[Int[np.ndarray, " S"], int], horizon: int) -> Seen:
    """A part is recorded; the better policy is the best of the process that the records suggest.

    The clinician's probabilities are those given the recorded part, without error of estimation.

    Args:
      world: whose rewards are -1 for death and 1 for discharge.
      visible: number of what is recorded of each state, and how many numbers there are.
      horizon: of the stays.
    """
    part = recorded(world, *visible)
    start = np.bincount(part.number, world.start, part.states)
    shown = suggested(expected_counts(world, part, horizon=horizon), start)
    return Seen(part.number, shown.clinician, learned(shown))


def _table_pools(
    world: MDP,
    seen: Seen,
    setting: Mapping[str, object],
    horizon: int,
    options: BenchmarkOptions,
    at_once: int | None,
) -> Iterator[Pool]:
    policies, distance = {}, {}
    for share in options.distances:
        for better, name in ((True, "best"), (False, "random")):
            label = f"{name} {share:g}"
            policies[label] = seen.mixed(share, better)
            distance[label] = share
    clinician = seen.clinician[seen.number]
    fitting = {"method": "tabular", "num_states": len(seen.best)}
    truth = {name: exact_value(world, policy, horizon=horizon) for name, policy in policies.items()}
    for repeats, first, stays in _parts(options, at_once):
        drawn = sample(world, stays, horizon=horizon, seed=(options.seed, first))
        data = drawn.under(clinician)
        probs = {name: jnp.asarray(drawn.probs(policy)) for name, policy in policies.items()}
        state = seen.number[drawn.state].astype(np.int32)
        yield Pool(setting, repeats, data, probs, truth, distance, fitting, state)


def run_pool(
    pool: Pool, options: BenchmarkOptions, progress: Callable[[float], None]
) -> pd.DataFrame:
    """One row per size, data set, policy and estimator.

    The smaller data sets are the first stays of the larger ones, so that data sets of different
    numbers share nothing.
    """
    tables: list[pd.DataFrame] = []
    most, total = max(options.sizes), len(options.sizes) * len(pool.repeats)
    for size in options.sizes:
        for place, repeat in enumerate(pool.repeats):
            rows = slice(place * most, place * most + size)
            table = _one(pool, rows, options, repeat)
            tables.append(table.assign(size=size, repeat=repeat, **pool.setting))
            progress(len(tables) / total)
    result = pd.concat(tables, ignore_index=True)
    result["truth"] = result["policy"].map(pool.truth)
    result["distance"] = result["policy"].map(pool.distance)
    return result


def _one(pool: Pool, rows: slice, options: BenchmarkOptions, repeat: int) -> pd.DataFrame:
    key = jax.random.fold_in(jax.random.key(options.seed), repeat)
    fit_key, bootstrap_key = jax.random.split(key)
    data = pool.data.select(rows)
    steps = data.num_steps
    probs = {name: p[rows] for name, p in pool.probs.items()}
    fitting = dict(pool.fitting)
    if pool.state is not None:
        fitting["state"] = jnp.asarray(pool.state[rows])
    # Fitted on the padded stays, so that one program serves all data sets of a size.
    fitted = fit(fit_key, data, probs, **fitting)
    data, probs, _ = check(data, probs)
    if data.num_steps < steps:
        fitted = fitted.select(np.arange(data.num_stays), data.num_steps)
    table = evaluate(
        data, probs, key=bootstrap_key, fitted=fitted, n_bootstrap=options.n_bootstrap,
        interval=options.interval, tail_levels=(),
    )  # fmt: skip
    return table[["policy", "estimator", "estimate", "low", "high", "ess", "trust"]]


class Sample(NamedTuple):
    """Recorded stays of a decision process."""

    data: OPEData
    state: np.ndarray  # [N, T] int32, 0 on padding
    last: np.ndarray  # [N] state after the last step

    def probs(self, policy: Float[np.ndarray, "S A"]) -> Float[np.ndarray, "N T A"]:
        """[N, T, A] probabilities of a policy [S, A] along the stays."""
        found: np.ndarray = policy[self.state].astype(np.float32)
        return found

    def under(self, clinician: Float[np.ndarray, "S A"]) -> OPEData:
        """The stays with other probabilities [S, A] of the clinician."""
        probs, action = self.probs(clinician), np.asarray(self.data.action)
        taken = np.take_along_axis(probs, action[..., None], -1)[..., 0]
        taken = np.where(np.asarray(self.data.alive), taken, 1.0)
        return replace(
            self.data, behavior_prob=jnp.asarray(taken), behavior_probs=jnp.asarray(probs)
        )


def sample(mdp: MDP, stays: int, *, horizon: int, seed: int | tuple[int, ...]) -> Sample:
    """Stays under the clinician, cut at the horizon."""
    rng = np.random.default_rng(seed)
    policy = mdp.clinician.cumsum(-1)
    ahead = mdp.transition.cumsum(-1, dtype=np.float32)

    def draw(cumulative: np.ndarray) -> np.ndarray:
        total = cumulative[:, -1:]
        drawn: np.ndarray = (cumulative < rng.random((len(cumulative), 1)) * total).sum(-1)
        return drawn

    shape = (stays, horizon)
    state, action = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    reward, alive = np.zeros(shape, np.float32), np.zeros(shape, bool)
    now = draw(np.broadcast_to(mdp.start.cumsum(), (stays, len(mdp.start))))
    on = ~mdp.terminal[now]
    for t in range(horizon):
        chosen = draw(policy[now])
        following = draw(ahead[now, chosen])
        alive[:, t] = on
        state[:, t], action[:, t] = np.where(on, now, 0), np.where(on, chosen, 0)
        reward[:, t] = np.where(on, mdp.reward[now, chosen, following], 0.0)
        now = np.where(on, following, now)
        on = on & ~mdp.terminal[now]
    probs = mdp.clinician[state].astype(np.float32)
    taken = np.take_along_axis(probs, action[..., None], -1)[..., 0]
    data = OPEData(
        reward=jnp.asarray(reward),
        alive=jnp.asarray(alive),
        action=jnp.asarray(action),
        behavior_prob=jnp.asarray(np.where(alive, taken, 1.0)),
        behavior_probs=jnp.asarray(probs),
    )
    return Sample(data, state, now)


def exact_values(
    mdp: MDP, drawn: Sample, policies: list[np.ndarray], *, gamma: float = 1.0
) -> Values:
    """[K, N, T] exact Q(s_t, a_t) and V(s_t) of policies along recorded stays."""
    steps = drawn.state.shape[1]
    action, alive = np.asarray(drawn.data.action), np.asarray(drawn.data.alive)
    q, v = [], []
    for policy in policies:
        table = exact(mdp, policy, horizon=steps, gamma=gamma)
        rows = table[np.arange(steps), drawn.state]  # [N, T, A]
        q.append(np.take_along_axis(rows, action[..., None], -1)[..., 0] * alive)
        v.append((policy[drawn.state] * rows).sum(-1) * alive)
    return Values(jnp.asarray(np.stack(q), jnp.float32), jnp.asarray(np.stack(v), jnp.float32))
