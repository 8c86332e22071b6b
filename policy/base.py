"""The one protocol of policies: a distribution over the 25 actions for what was seen."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.view import View, as_pytree, view_at


class Policy:
    """A PyTree (`flax.struct.dataclass`) that is called as `policy(key, view) -> [25]`.

    One call is for one patient; worlds and `action_probs` map it over patients. Whatever takes
    a policy takes a plain function of the same signature too.
    """

    past: ClassVar[int] = 0
    """Rows of `View.past` that the policy looks back on."""

    def __call__(self, key: jax.Array, view: View) -> jax.Array:
        """Probabilities [25] of the joint actions; the key is consumed."""
        raise NotImplementedError

    def act(self, key: jax.Array, view: View) -> jax.Array:
        """[] int32 joint action 0-24, drawn from the probabilities."""
        own, draw = jax.random.split(key)
        chosen = jax.random.categorical(draw, jnp.log(self(own, view)))
        return chosen.astype(jnp.int32)

    def action_probs(
        self, episodes: Episodes, *, key: jax.Array | None = None, block: int = 1024
    ) -> np.ndarray:
        """[N, T, 25] probabilities in every recorded row; uniform on padding.

        Args:
          episodes: the stays.
          key: of policies that draw; consumed.
          block: rows per call; bounds the memory.
        """
        key = jax.random.key(0) if key is None else key
        probs = np.full(
            (episodes.num_stays, episodes.num_steps, schema.NUM_ACTIONS),
            1.0 / schema.NUM_ACTIONS,
            np.float32,
        )
        stay, step = np.nonzero(np.asarray(episodes.valid))
        for first in range(0, len(stay), block):
            rows = np.minimum(np.arange(first, first + block), len(stay) - 1)  # one shape for all
            index = (jnp.asarray(rows), jnp.asarray(stay[rows]), jnp.asarray(step[rows]))
            found = _on_rows(as_pytree(self), key, episodes, *index, past=self.past)
            probs[stay[rows], step[rows]] = found
        return probs


@partial(jax.jit, static_argnames="past")
def _on_rows(
    policy: Any,
    key: jax.Array,
    episodes: Episodes,
    row: jax.Array,
    stay: jax.Array,
    step: jax.Array,
    *,
    past: int,
) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
    return jax.vmap(policy)(keys, view_at(episodes, stay, step, past=past))
