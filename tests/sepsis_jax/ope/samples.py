"""Recorded stays for tests: arbitrary numbers, and a small decision process that is known."""

import jax.numpy as jnp
import numpy as np

from sepsis_jax.ope import Fitted, OPEData, Values

ACTIONS = 25


def random_case(stays=40, steps=9, policies=3, seed=0, distance=0.5):
    """Data, {name: probs}, and fitted ingredients of random numbers; not a real process."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, steps + 1, stays)
    length[0] = steps
    alive = np.arange(steps) < length[:, None]
    behavior = rng.dirichlet(np.full(ACTIONS, 3.0), (stays, steps)).astype(np.float32)
    action = (behavior.cumsum(-1) > rng.random((stays, steps, 1))).argmax(-1)
    other = rng.dirichlet(np.full(ACTIONS, 3.0), (policies, stays, steps)).astype(np.float32)
    share = distance * np.arange(1, policies + 1)[:, None, None, None] / policies
    probs = ((1 - share) * behavior + share * other).astype(np.float32)
    data = OPEData(
        reward=jnp.asarray(np.where(alive, rng.normal(size=alive.shape) + 0.5, 0), jnp.float32),
        alive=jnp.asarray(alive),
        action=jnp.asarray(np.where(alive, action, 0), jnp.int32),
        behavior_prob=jnp.asarray(
            np.where(alive, np.take_along_axis(behavior, action[..., None], -1)[..., 0], 1.0)
        ),
        behavior_probs=jnp.asarray(behavior),
    )

    def values():
        draws = rng.normal(size=(2, policies, *alive.shape)) * alive
        return Values(jnp.asarray(draws[0], jnp.float32), jnp.asarray(draws[1], jnp.float32))

    marginal = rng.gamma(4.0, 0.25, (policies, *alive.shape))
    fitted = Fitted(values(), values(), jnp.asarray(marginal, jnp.float32))
    return data, {f"policy {k}": probs[k] for k in range(policies)}, fitted
