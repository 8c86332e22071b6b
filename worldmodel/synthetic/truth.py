"""Questions only a world that is known can answer exactly.

- `counterfactual`: the same patients, with the same random numbers, under other treatments;
- `true_value`: what a policy is worth, with its Monte Carlo error;
- `true_action_effects`: what each of the 25 actions does to MAP and lactate in 4 hours.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import keys, schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.observation import PolicyFn
from worldmodel.synthetic.generate import Truth, generate_patients
from worldmodel.synthetic.latent import Latent
from worldmodel.synthetic.patients import (
    Noise,
    Traits,
    draw,
    draw_traits,
    middle_noise,
    patient_key,
)
from worldmodel.synthetic.physiology import advance
from worldmodel.synthetic.simulate import BLOCK, actor_of, run
from worldmodel.synthetic.world import Config, Params, doses


class PolicyValue(NamedTuple):
    """True value of a policy in the world, with standard errors of the Monte Carlo mean."""

    value: float  # mean undiscounted total reward
    value_se: float
    discounted: float  # mean discounted total reward
    discounted_se: float
    mortality: float  # share dead by day 90
    mortality_se: float
    length: float  # mean number of steps
    total: np.ndarray  # [N] undiscounted total reward per patient, for paired comparisons

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `value`."""
        return self.value - 1.96 * self.value_se, self.value + 1.96 * self.value_se


class ActionEffects(NamedTuple):
    """Mean noise-free state one step later, [B, 25] by joint action."""

    meanbp: jax.Array  # mmHg
    lactate: jax.Array  # mmol/L


def counterfactual(
    truth: Truth, plans: np.ndarray, *, policy: PolicyFn | None = None, block: int = BLOCK
) -> tuple[Episodes, Truth]:
    """The patients of `truth` under other treatments, with the same random numbers.

    The recorded actions give back the recorded stays to the bit.

    Args:
      truth: from `generate`.
      plans: [N, <=T] actions 0-24; `simulate.FOLLOW_POLICY` (-1) and steps beyond the plan
        are left to the policy.
      policy: treats where the plan leaves the choice; None for the clinician.
      block: patients per call; bounds the memory.
    """
    return generate_patients(
        truth.key, np.asarray(truth.patient), plans, config=truth.config, params=truth.params,
        policy=policy, keep_latent=truth.latent is not None, block=block,
    )  # fmt: skip


def true_value(
    key: jax.Array,
    policy: PolicyFn | None,
    num_patients: int,
    *,
    discount: float = 0.99,
    config: Config | None = None,
    params: Params | None = None,
    first_patient: int = 0,
    block: int = BLOCK,
) -> PolicyValue:
    """Monte Carlo value of a policy; the same key gives every policy the same patients.

    Args:
      key: of the world.
      policy: in-graph `(key, observation) -> [25]`; None for the clinician.
      num_patients: number of stays; the error falls with its square root.
      discount: per step, of the discounted value.
      config, params: the world.
      first_patient: number of the first patient.
      block: patients per call; bounds the memory.
    """
    if num_patients < 2:
        raise InputError(f"number of patients is {num_patients}; an error needs at least 2")
    stays, _ = run(
        key,
        np.arange(first_patient, first_patient + num_patients),
        None,
        actor_of(policy),
        params=params or Params(),
        config=config or Config(),
        discount=discount,
        block=block,
    )

    def mean(values: jax.Array) -> tuple[float, float]:
        host = np.asarray(values, np.float64)
        return float(host.mean()), float(host.std(ddof=1) / np.sqrt(len(host)))

    return PolicyValue(
        *mean(stays.total),
        *mean(stays.discounted),
        *mean(stays.died_90d),
        length=float(np.mean(stays.length)),
        total=np.asarray(stays.total),
    )


def true_action_effects(
    truth: Truth, stay: np.ndarray, step: np.ndarray, *, samples: int = 0
) -> ActionEffects:
    """Underlying MAP and lactate 4 hours after each of the 25 actions.

    Args:
      truth: from `generate`, with latent states.
      stay: [B] positions in `truth`.
      step: [B] rows of those stays.
      samples: 0 for the noise-free step; otherwise the mean over that many draws of noise,
        the same for all actions.

    Raises:
      InputError: `truth` holds no latent states.
    """
    if truth.latent is None:
        raise InputError("truth: latent states were not kept; generate with keep_latent=True")
    latent = jax.tree.map(lambda leaf: jnp.asarray(leaf)[stay, step], truth.latent)
    patients, steps = truth.patient[stay], jnp.asarray(step, jnp.int32)
    result: ActionEffects = _action_effects(
        truth.key, patients, latent, steps, truth.params, config=truth.config, samples=samples
    )
    return result


def _effects(
    key: jax.Array,
    patients: jax.Array,
    latent: Latent,
    steps: jax.Array,
    params: Params,
    *,
    config: Config,
    samples: int,
) -> ActionEffects:
    actions = jnp.arange(schema.NUM_ACTIONS)

    def after(
        action: jax.Array, noise: Noise, traits: Traits, state: Latent, step: jax.Array
    ) -> ActionEffects:
        vasopressor, fluid = schema.action_levels(action)
        dose = doses(vasopressor, fluid, noise, params, config)
        state = advance(state, *dose, step, traits, noise, params.physiology)
        return ActionEffects(state.map, state.lactate)

    def one(patient: jax.Array, state: Latent, step: jax.Array) -> ActionEffects:
        own = patient_key(key, patient)
        traits = draw_traits(own, params.patient)

        def under(noise: Noise) -> ActionEffects:
            return jax.vmap(after, (0, None, None, None, None))(actions, noise, traits, state, step)

        if not samples:
            return under(middle_noise())
        fresh = jax.random.fold_in(own, keys.EFFECT_SAMPLES)
        noises = jax.vmap(lambda i: draw(jax.random.fold_in(fresh, i), step))(jnp.arange(samples))
        result: ActionEffects = jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(under)(noises))
        return result

    return jax.vmap(one)(patients, latent, steps)


_action_effects = jax.jit(_effects, static_argnames=("config", "samples"))
