"""Advantages of decisions from simulated futures of all 25 actions.

From the state in which the model decided, every action is simulated under common random numbers,
and followed by a continuation policy p. The advantage of an action is

    A(s, a) = Q(s, a) - sum_a' p(a' | s) Q(s, a'),
    Q(s, a) = E[r + return of p afterwards | s, a].

By the performance difference lemma (Kakade & Langford 2002) the sum of A over the model's decisions
is the gain of the model over p, and improving on A improves on p as in rollout algorithms
(Bertsekas 2013). The estimate depends neither on the random numbers of the real episode nor on the
model's later decisions, which are the main sources of variance of whole returns.

`planned` takes Q from a planner instead: each action is held for some steps in the world model, the
clinician goes on, and what is still to come then is learned, not sampled. It needs a tenth of the
simulated steps, has less noise, and knows of the patient what the chart says, not the true state.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from policy.agent.env_pool import StateScorer
from policy.planner import Planner, is_supported
from worldmodel import schema
from worldmodel.envs.env import EnvState, SepsisEnv
from worldmodel.errors import InputError
from worldmodel.keys import COUNTERFACTUAL
from worldmodel.observation import Observation, PolicyFn, as_pytree, draw_action, recent


def counterfactual(
    env: SepsisEnv,
    policy: PolicyFn,
    *,
    samples: int,
    horizon: int | None = None,
    smooth: bool = False,
) -> StateScorer:
    """A state scorer: advantages [25] of all actions over a continuation policy.

    Args:
      env: environment whose observations have as many past rows as the policy needs.
      policy: continuation policy, which acts after the first action.
      samples: futures per action; the same random numbers for all actions of a state.
      horizon: steps after the first action; to the end of the episode if not given.
      smooth: replace Q by its least-squares fit by a polynomial of degree two in both levels. This
        has a quarter of the variance if the noise of actions is independent, and a bias where Q
        is not quadratic.

    Raises:
      InputError: a size below 1.
    """
    if samples < 1 or (horizon is not None and horizon < 1):
        raise InputError("counterfactual: samples and horizon must be at least 1")
    past = getattr(policy, "past", 0)
    steps = np.iinfo(np.int32).max if horizon is None else horizon
    return partial(
        _advantages, env, as_pytree(policy),
        past=past, samples=samples, horizon=steps, smooth=smooth,
    )  # fmt: skip


def planned(planner: Planner) -> StateScorer:
    """A state scorer: advantages [25] over the clinician, by a planner's search.

    Actions that the planner does not support have the least advantage of those that it does.

    Args:
      planner: of a world model; the environment's observations have as many past rows as it needs.
    """
    return partial(_planned, planner)


@jax.jit
def _planned(planner: Planner, states: EnvState) -> jax.Array:
    """[B, 25]; 0 where the episode is over."""

    def of_patient(key: jax.Array, observation: Observation) -> jax.Array:
        prior = planner.prior(observation)
        values = planner.action_values(key, observation)
        known = is_supported(values)
        values = jnp.where(known, values, jnp.min(values, where=known, initial=jnp.inf))
        return values - prior @ values

    keys = jax.vmap(_keys, (0, None))(states, 1)[:, 0]
    gain = jax.vmap(of_patient)(keys, recent(states.last.observation, planner.past))
    return jnp.where(states.last.done[:, None], 0.0, gain)


def smoothing() -> np.ndarray:
    """[25, 25] projection of action values onto polynomials of degree two in both levels."""
    vasopressor, fluid = schema.action_levels(np.arange(schema.NUM_ACTIONS))
    powers = [vasopressor**i * fluid**j for i in range(3) for j in range(3 - i)]
    basis = np.stack(powers, -1).astype(np.float64)
    return basis @ np.linalg.pinv(basis)


@partial(jax.jit, static_argnames=("past", "samples", "horizon", "smooth"))
def _advantages(
    env: SepsisEnv,
    policy: PolicyFn,
    states: EnvState,
    *,
    past: int,
    samples: int,
    horizon: int,
    smooth: bool,
) -> jax.Array:
    """[B, 25]; 0 where the episode is over."""
    keys = jax.vmap(_keys, (0, None))(states, samples)  # [B, S]

    def begin(state: EnvState, key: jax.Array, action: jax.Array) -> tuple[EnvState, jax.Array]:
        state, timestep = env.step(env.with_key(state, key), action)
        return state, timestep.reward

    of_actions = jax.vmap(begin, (None, None, 0))
    of_samples = jax.vmap(of_actions, (None, 0, None))
    futures = jax.vmap(of_samples, (0, 0, None))(states, keys, jnp.arange(schema.NUM_ACTIONS))

    def go_on(state: EnvState, key: jax.Array, step: jax.Array) -> tuple[EnvState, jax.Array]:
        observation = recent(state.last.observation, past)
        action = draw_action(policy, jax.random.fold_in(key, step), observation)
        state, timestep = env.step(state, action)
        return state, timestep.reward

    of_all = jax.vmap(jax.vmap(jax.vmap(go_on, (0, None, None)), (0, 0, None)), (0, 0, None))

    # states of an environment over any source of dynamics
    def unfinished(carry: Any) -> jax.Array:
        step, (state, _) = carry
        result: jax.Array = (step < horizon) & ~state.last.done.all()
        return result

    def advance(carry: Any) -> Any:
        step, (state, total) = carry
        state, reward = of_all(state, keys, step)
        return step + 1, (state, total + reward)

    _, (_, returns) = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), futures))
    values = returns.mean(1)  # [B, 25]
    if smooth:
        values = values @ jnp.asarray(smoothing(), jnp.float32)
    observations = recent(states.last.observation, past)
    continuation = jax.vmap(policy)(keys[:, 0], observations)
    gain = values - jnp.sum(continuation * values, -1, keepdims=True)
    return jnp.where(states.last.done[:, None], 0.0, gain)


def _keys(state: EnvState, samples: int) -> jax.Array:
    own = jax.random.fold_in(state.dynamics.key, COUNTERFACTUAL + state.taken.astype(jnp.uint32))
    return jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(samples))
