"""Playing whole episodes in one compiled call."""

from functools import partial

import jax
import jax.numpy as jnp


def keys_of(key, count):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


@jax.jit
def play(env, key, actions):
    """One episode under actions [T]: the first timestep and those that follow, leaves [T, ...]."""
    state, first = env.reset(key)
    state, rest = jax.lax.scan(env.step, state, actions)
    return state, first, rest


@jax.jit
def play_all(env, keys, actions):
    """Episodes [N] under actions [N, T]."""
    return jax.vmap(partial(play, env))(keys, actions)


@partial(jax.jit, static_argnames="steps")
def play_table(env, keys, policy, steps):
    """Episodes [N] of discrete states under a policy [S, A]: returns and lengths."""

    def one(key):
        state, first = env.reset(key)

        def step(carry, t):
            state, observation = carry
            draw = jax.random.fold_in(jax.random.fold_in(key, 1 << 20), t)
            action = jax.random.categorical(draw, jnp.log(policy[observation]))
            state, timestep = env.step(state, action)
            return (state, timestep.observation), timestep.reward

        (state, _), rewards = jax.lax.scan(step, (state, first.observation), jnp.arange(steps))
        return rewards.sum(), state.taken, state.last.done

    return jax.vmap(one)(keys)
