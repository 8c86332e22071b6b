"""Compiled `worldmodel.envs.unroll` under fixed actions, and under a policy of discrete states."""

from functools import partial

import jax
import jax.numpy as jnp

from worldmodel.envs import FollowActions, unroll


def keys_of(key, count):
    """[count] keys."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


@jax.jit
def reset(env, *arguments):
    """`env.reset`, compiled once for all environments of a form."""
    return env.reset(*arguments)


@jax.jit
def step(env, state, action):
    """`env.step`, likewise."""
    return env.step(state, action)


@jax.jit
def play(env, key, actions):
    """One episode under actions [T]: the first timestep and those that follow, leaves [T, ...]."""
    state, trajectory = unroll(env, FollowActions(actions), key, num_steps=len(actions))
    return state, trajectory.first, trajectory.timesteps


@jax.jit
def play_all(env, keys, actions):
    """Episodes [N] under actions [N, T]."""
    return jax.vmap(partial(play, env))(keys, actions)


@partial(jax.jit, static_argnames="steps")
def play_table(env, keys, policy, steps):
    """Episodes [N] of discrete states under a policy [S, A]: returns, lengths, whether done."""

    def one(key):
        state, trajectory = unroll(env, lambda _, number: policy[number], key, num_steps=steps)
        return trajectory.timesteps.reward.sum(), state.taken, state.last.done

    return jax.vmap(one)(keys)
