"""How good probabilities of actions are, and the two numbers that make them honest."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

_BINS = 10
_HALVINGS = 30
_ROUNDS = 30
_LARGEST = 3.0  # of the logarithm of the temperature


def judge(
    probs: np.ndarray, action: np.ndarray, used: np.ndarray
) -> tuple[dict[str, float], pd.DataFrame]:
    """Likelihood, accuracy and calibration of [N, T, A] probabilities on the steps `used` [N, T].

    The expected calibration error bins the probability of every action, not of the likeliest
    alone, since any of them may become the denominator of a weight. Bins hold equally many.

    Args:
      probs: [N, T, A].
      action: [N, T] int, the action taken.
      used: [N, T] bool.

    Returns:
      `nll` (nats), `top1`, `ece`, `least_taken` (least probability of an action that was taken)
      and `steps`; and the bins with `predicted`, `observed` frequency and `count`.
    """
    rows, taken = np.asarray(probs)[used], np.asarray(action)[used]
    chosen = rows[np.arange(len(taken)), taken]
    hit = np.zeros_like(rows)
    hit[np.arange(len(taken)), taken] = 1.0
    edges = np.quantile(rows, np.linspace(0, 1, _BINS + 1)[1:-1])
    place = np.searchsorted(edges, rows.reshape(-1))
    table = (
        pd.DataFrame({"bin": place, "predicted": rows.reshape(-1), "observed": hit.reshape(-1)})
        .groupby("bin")
        .agg(predicted=("predicted", "mean"), observed=("observed", "mean"),
             count=("observed", "size"))
        .reset_index(drop=True)
    )  # fmt: skip
    gap = (table["predicted"] - table["observed"]).abs()
    report = {
        "nll": float(-np.log(np.maximum(chosen, 1e-12)).mean()),
        "top1": float((rows.argmax(-1) == taken).mean()),
        "ece": float((gap * table["count"]).sum() / table["count"].sum()),
        "least_taken": float(chosen.min()),
        "steps": len(taken),
    }
    return report, table


class Calibration(NamedTuple):
    """(1 - lapse) softmax(logits / temperature) + lapse / A."""

    temperature: jax.Array  # []
    lapse: jax.Array  # [] share of decisions that no state explains


@jax.jit
def fit_calibration(logits: jax.Array, action: jax.Array) -> Calibration:
    """The likeliest temperature and lapse rate, by expectation-maximisation.

    A temperature alone cannot mend probabilities near 0, of which weights are made: a model that
    thinks an action next to impossible is wrong whenever somebody lapses (Wichmann & Hill 2001).

    Args:
      logits: [M, A]; log-probabilities will do.
      action: [M] int, the action taken.
    """
    rare = 1.0 / logits.shape[-1]

    def improve(_: int, now: Calibration) -> Calibration:
        probs = jax.nn.softmax(logits / now.temperature)
        chosen = jnp.take_along_axis(probs, action[:, None], -1)[:, 0]
        lapsed = now.lapse * rare / ((1 - now.lapse) * chosen + now.lapse * rare)
        return Calibration(fit_temperature(logits, action, 1 - lapsed), lapsed.mean())

    start = Calibration(fit_temperature(logits, action), jnp.float32(0.05))
    return jax.lax.fori_loop(0, _ROUNDS, improve, start)


@jax.jit
def fit_temperature(
    logits: jax.Array, action: jax.Array, weight: jax.Array | float = 1.0
) -> jax.Array:
    """[] temperature T that makes softmax(logits / T) likeliest (Guo et al., ICML 2017).

    Args:
      logits: [M, A]; log-probabilities will do.
      action: [M] int, the action taken.
      weight: [M] of the rows.

    Returns:
      T within exp(-3) and exp(3): above 1 where the logits were too sure of themselves.
    """
    taken = jnp.take_along_axis(logits, action[:, None], -1)[:, 0]

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The likelihood is concave in 1 / T; its slope there is mean taken - expected logit.
        low, high = bounds
        middle = (low + high) / 2
        expected = (jax.nn.softmax(logits * jnp.exp(-middle)) * logits).sum(-1)
        too_sure = (weight * (taken - expected)).sum() < 0
        return jnp.where(too_sure, middle, low), jnp.where(too_sure, high, middle)

    start = (jnp.float32(-_LARGEST), jnp.float32(_LARGEST))
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, start)
    return jnp.exp((low + high) / 2)
