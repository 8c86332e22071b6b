"""A tiny linear world, for tests that need episodes but no physiology."""

import jax.numpy as jnp
import numpy as np

from worldmodel import schema
from worldmodel.episodes import Episodes


def toy_episodes(num_stays=60, num_steps=9, seed=0) -> Episodes:
    """Stays in which MAP follows vasopressors and lactate follows MAP; the rest is random."""
    rng = np.random.default_rng(seed)
    length = rng.integers(2, num_steps + 1, num_stays)
    length[0] = num_steps
    vasopressor = rng.integers(0, 5, (num_stays, num_steps))
    fluid = rng.integers(0, 5, (num_stays, num_steps))
    middle = np.sqrt(np.maximum(schema.LOW, 0.5) * schema.HIGH)
    dynamic = np.empty((num_stays, num_steps, 39))
    dynamic[:, 0] = middle * np.exp(0.1 * rng.normal(size=(num_stays, 39)))
    meanbp, lactate = schema.INDEX["meanbp"], schema.INDEX["lactate"]
    for t in range(1, num_steps):
        drift = 0.9 * (dynamic[:, t - 1] - middle) + 0.03 * middle * rng.normal(
            size=(num_stays, 39)
        )
        dynamic[:, t] = middle + drift
        dynamic[:, t, meanbp] += 3.0 * vasopressor[:, t - 1] - 6.0
        dynamic[:, t, lactate] += 0.05 * (65 - dynamic[:, t, meanbp]) - 0.1 * fluid[:, t - 1]
    dynamic = np.clip(dynamic, schema.LOW, schema.HIGH)
    valid = np.arange(num_steps) < length[:, None]

    def on_valid(values, dtype):
        shape = valid.shape + (1,) * (values.ndim - 2)
        return jnp.asarray(np.where(valid.reshape(shape), values, 0).astype(dtype))

    died = rng.random(num_stays) < 0.3
    return Episodes(
        dynamic=on_valid(dynamic, np.float32),
        measured=on_valid(rng.random((num_stays, num_steps, 38)) < 0.7, np.bool_),
        static=jnp.asarray(
            np.stack(
                [
                    rng.uniform(20, 90, num_stays),
                    rng.integers(0, 2, num_stays),
                    rng.integers(0, 12, num_stays),
                ],
                axis=1,
            ),
            jnp.float32,
        ),
        vasopressor=on_valid(vasopressor, np.int32),
        fluid=on_valid(fluid, np.int32),
        vasopressor_dose=on_valid(0.1 * vasopressor, np.float32),
        fluid_dose=on_valid(100.0 * fluid, np.float32),
        ventilated=on_valid(rng.random((num_stays, num_steps)) < 0.4, np.bool_),
        sofa=on_valid(rng.integers(0, 12, (num_stays, num_steps)), np.float32),
        urine_24h=on_valid(rng.uniform(0, 3000, (num_stays, num_steps)), np.float32),
        behavior_prob=on_valid(np.full((num_stays, num_steps), 0.04), np.float32),
        length=jnp.asarray(length, jnp.int32),
        died_90d=jnp.asarray(died),
        died_in_hospital=jnp.asarray(died),
        stay_id=jnp.arange(num_stays, dtype=jnp.int32) + 30_000_000,
        subject_id=jnp.arange(num_stays, dtype=jnp.int32) + 10_000_000,
        split=jnp.asarray(np.arange(num_stays) % 5 % 4 % 3, jnp.int32),
    )
