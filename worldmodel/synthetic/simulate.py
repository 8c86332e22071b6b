"""Whole stays of many patients: one scan over steps, mapped over patients.

Everything that runs the world (generation, counterfactuals, true values) goes through
`simulate_block`, so that equal inputs give bitwise equal stays.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import keys, schema, struct
from worldmodel.errors import InputError
from worldmodel.observation import PolicyFn, as_pytree
from worldmodel.resources import usable_cores
from worldmodel.synthetic import clinician
from worldmodel.synthetic.latent import Latent
from worldmodel.synthetic.patients import Noise, draw, patient_keys
from worldmodel.synthetic.world import (
    Config,
    Params,
    State,
    Transition,
    reset,
    sample_action,
    step_with_noise,
)

FOLLOW_POLICY = -1  # in a plan: let the policy choose
BLOCK = 1024  # patients per call: fits the caches of a CPU core
_WIDTH = 64  # blocks are a multiple of this, so that every patient runs in full vectors

Actor = Callable[[jax.Array, State, Params], jax.Array]  # (key, state, params) -> [25]


@struct.dataclass
class Rows:
    """Recorded rows, [C, T, ...]; undefined where `valid` is False."""

    dynamic: jax.Array  # [C, T, 39]
    measured: jax.Array  # [C, T, 38]
    ventilated: jax.Array  # [C, T]
    sofa: jax.Array  # [C, T]
    urine_24h: jax.Array  # [C, T]
    action: jax.Array  # [C, T] int32
    probabilities: jax.Array  # [C, T, 25] of the policy that was evaluated
    vasopressor_dose: jax.Array  # [C, T]
    fluid_dose: jax.Array  # [C, T]
    reward: jax.Array  # [C, T]
    valid: jax.Array  # [C, T] bool, the row exists
    latent: Latent | None  # leaves [C, T, ...], true state at the start of the step


@struct.dataclass
class Stays:
    """Totals and outcomes of stays, [C]."""

    total: jax.Array  # undiscounted total reward
    discounted: jax.Array
    length: jax.Array  # int32 rows
    died_90d: jax.Array  # bool
    died_in_hospital: jax.Array  # bool
    static: jax.Array  # [C, 3]


def clinician_actor(key: jax.Array, state: State, params: Params) -> jax.Array:
    """The recorded clinician as an actor."""
    del key
    return clinician.probabilities(state.observation, state.traits.frailty, params.clinician)


def actor_of(policy: PolicyFn | None) -> Actor:
    """An actor that chooses with a policy; None is the recorded clinician."""
    if policy is None:
        return jax.tree_util.Partial(clinician_actor)
    return jax.tree_util.Partial(_act_on_observation, as_pytree(policy))


def _act_on_observation(
    policy: PolicyFn, key: jax.Array, state: State, params: Params
) -> jax.Array:
    del params
    return policy(key, state.observation)


_Carry = tuple[State, Stays, jax.Array]  # state, totals, discount weight


def simulate_block(
    key: jax.Array,
    patients: jax.Array,
    plans: jax.Array,
    actor: Actor,
    params: Params,
    discount: jax.Array,
    *,
    config: Config,
    collect: bool,
    keep_latent: bool,
) -> tuple[Stays, Rows | None]:
    """Stays of C patients.

    Args:
      key: the world's key.
      patients: [C] int32 patient numbers.
      plans: [C, T] int32 actions, `FOLLOW_POLICY` where the actor chooses.
      actor: PyTree `(key, state, params) -> [25]`.
      params: coefficients.
      discount: [] per step, of `Stays.discounted`.
      config: static settings.
      collect: whether to return the rows.
      keep_latent: whether rows hold the latent state.

    Returns:
      Totals and outcomes of the stays, and their rows if `collect`.
    """
    own_keys = patient_keys(key, patients)
    start = jax.vmap(lambda k: reset(k, params, config=config))(own_keys)

    # Drawn before the scan: inside, XLA would fuse the draw into every use of it.
    numbers = jnp.arange(config.horizon)
    noises = jax.vmap(lambda number: jax.vmap(draw, (0, None))(own_keys, number + 1))(numbers)

    def one(
        k: jax.Array, state: State, noise: Noise, planned: jax.Array
    ) -> tuple[State, Transition, Rows | None]:
        policy_key = jax.random.fold_in(jax.random.fold_in(k, keys.POLICY), state.observation.step)
        probabilities = actor(policy_key, state, params)
        chosen = sample_action(probabilities, noise)
        action = jnp.where(planned == FOLLOW_POLICY, chosen, planned)
        after, transition = step_with_noise(noise, state, action, params, config=config)
        if not collect:
            return after, transition, None
        rows = Rows(
            dynamic=state.observation.dynamic,
            measured=state.observation.measured,
            ventilated=state.observation.ventilated,
            sofa=state.observation.sofa,
            urine_24h=state.observation.urine_24h,
            action=action,
            probabilities=probabilities,
            vasopressor_dose=transition.vasopressor_dose,
            fluid_dose=transition.fluid_dose,
            reward=transition.reward,
            valid=~state.done,
            latent=state.latent if keep_latent else None,
        )
        return after, transition, rows

    def body(carry: _Carry, given: tuple[Noise, jax.Array]) -> tuple[_Carry, Rows | None]:
        state, sums, weight = carry
        after, transition, rows = jax.vmap(one)(own_keys, state, *given)
        ends = transition.done & ~state.done
        sums = replace(
            sums,
            total=sums.total + transition.reward,
            discounted=sums.discounted + weight * transition.reward,
            length=sums.length + ~state.done,
            died_90d=sums.died_90d | (ends & transition.died_90d),
            died_in_hospital=sums.died_in_hospital | (ends & transition.died_in_hospital),
        )
        return (after, sums, weight * discount), rows

    zeros = jnp.zeros(patients.shape)
    none = jnp.zeros(patients.shape, bool)
    sums = Stays(zeros, zeros, none.astype(jnp.int32), none, none, start.traits.static)
    carry = (start, sums, jnp.ones(()))
    (_, sums, _), rows = jax.lax.scan(body, carry, (noises, plans.T))
    if rows is not None:
        rows = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), rows)
    return sums, rows


_simulate = jax.jit(simulate_block, static_argnames=("config", "collect", "keep_latent"))


def run(
    key: jax.Array,
    patients: np.ndarray,
    plans: np.ndarray | None,
    actor: Actor,
    *,
    params: Params,
    config: Config,
    discount: float = 1.0,
    collect: bool = False,
    keep_latent: bool = False,
    block: int = BLOCK,
) -> tuple[Stays, Rows | None]:
    """Stays of any number of patients, block by block, as NumPy arrays.

    One program of fixed size simulates every block, so a patient's stay is the same to the bit
    whoever else is simulated. On CPUs the blocks run on all cores.

    Args:
      key: the world's key.
      patients: [N] patient numbers.
      plans: [N, <=T] actions, `FOLLOW_POLICY` where the actor chooses; None for all.
      actor: from `actor_of`.
      params, config: the world.
      discount: per step.
      collect, keep_latent: what to return.
      block: patients per call, a multiple of 64; bounds the memory. Other sizes agree up to
        rounding.
    """
    patients = np.asarray(patients, np.int32)
    plans = _check_plans(plans, len(patients), config.horizon)
    if block < _WIDTH or block % _WIDTH:
        raise InputError(f"block is {block}; give a multiple of {_WIDTH}")

    def simulate(first: int) -> tuple[Stays, Rows | None]:
        here = slice(first, first + block)
        count = len(patients[here])
        padding = block - count
        result = _simulate(
            key,
            jnp.asarray(np.pad(patients[here], (0, padding))),
            jnp.asarray(np.pad(plans[here], ((0, padding), (0, 0)))),
            actor,
            params,
            jnp.float32(discount),
            config=config,
            collect=collect,
            keep_latent=keep_latent,
        )
        returned: tuple[Stays, Rows | None] = jax.tree.map(
            lambda leaf: np.asarray(leaf)[:count], result
        )
        return returned

    # One core cannot fill two with arrays of this size; an accelerator needs no threads.
    workers = usable_cores() if jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(simulate, range(0, len(patients), block)))
    returned: tuple[Stays, Rows | None] = jax.tree.map(
        lambda *leaves: np.concatenate(leaves), *parts
    )
    return returned


def _check_plans(plans: np.ndarray | None, count: int, horizon: int) -> np.ndarray:
    full = np.full((count, horizon), FOLLOW_POLICY, np.int32)
    if plans is None:
        return full
    plans = np.asarray(plans)
    if plans.ndim != 2 or len(plans) != count or plans.shape[1] > horizon:
        raise InputError(
            f"plans: shape {plans.shape}, expected ({count}, at most {horizon}); "
            "give one row of actions per patient"
        )
    if plans.size and (plans.min() < FOLLOW_POLICY or plans.max() >= schema.NUM_ACTIONS):
        raise InputError(
            f"plans: actions must be 0 to {schema.NUM_ACTIONS - 1}, "
            f"or {FOLLOW_POLICY} to let the policy choose"
        )
    full[:, : plans.shape[1]] = plans
    return full
