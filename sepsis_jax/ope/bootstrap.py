"""All estimators, policies and resamples in a few matrix products.

A bootstrap resample of N stays is a row of multinomial counts; its column means are
counts @ columns / N, and every estimator is a function of column means, so its normaliser is
recomputed in every resample.

The distribution of the return under a policy is resampled with them. With stays sorted by return,
F(x) = sum_i w_i 1[G_i <= x] / sum_i w_i (Huang, Leqi, Lipton & Azizzadenesheli 2021, self-
normalised); quantiles invert F, and the lower CVaR at level a is the mean of the worst share a,
(1/a) int_0^a F^-1(u) du (Chandak et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from sepsis_jax.ope import weights
from sepsis_jax.ope.estimators import Batch, Means, columns, evaluate_means
from sepsis_jax.ope.weights import fresh, numbers, scaled, take

_RESAMPLES = 512  # at once; enough for the speed of a matrix product, whatever the number of stays
_COUNTS = 1 << 26  # at once: 64 MB
_DRAWS = 1 << 20  # at once: temporaries that the allocator keeps


class Tail(NamedTuple):
    """What the distributional estimators need; stays sorted by return."""

    returns: jax.Array  # [N]
    weights: jax.Array  # [K + 1, N], the last being the clinician's: all 1
    levels: tuple[float, ...]


def block_shapes(batch: Batch, *, names: Sequence[str]) -> dict[str, jax.Array]:
    """The blocks of columns; for `jax.eval_shape`."""
    return columns(batch, names)


def join(batch: Batch, names: Sequence[str]) -> tuple[Float[Array, "N KS"], dict[str, int]]:
    """[N, K * S] columns that the estimators need, and the widths of their blocks."""
    blocks = columns(batch, names)
    table = jnp.concatenate(list(blocks.values()), -1)
    table = jnp.swapaxes(table, 0, 1).reshape(table.shape[1], -1)
    return table, {block: values.shape[-1] for block, values in blocks.items()}


def split(means: jax.Array, widths: dict[str, int]) -> Means:
    """[..., K, S] column means by block."""
    ends = np.cumsum(list(widths.values()))[:-1]
    return dict(zip(widths, jnp.split(means, ends, -1), strict=True))


def draw_counts(rng: np.random.Generator, resamples: int, stays: int) -> Num[np.ndarray, "B N"]:
    """[B, N] uint8 how often each stay is drawn; every row sums to N."""
    counts = np.empty((resamples, stays), np.uint8)
    step = max(_DRAWS // stays, 1)
    for first in range(0, resamples, step):
        rows = counts[first : first + step]
        index = rng.integers(0, stays, rows.shape, dtype=np.int32)
        index += stays * np.arange(len(rows), dtype=np.int32)[:, None]
        rows[:] = np.bincount(index.ravel(), minlength=rows.size).reshape(rows.shape)
    return counts


def generator(key: jax.Array) -> np.random.Generator:
    """A NumPy generator from a JAX key, which is consumed.

    Counting draws by scatter is several times slower in XLA on a CPU than in NumPy.
    """
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())


@partial(jax.jit, static_argnames=("names", "widths", "levels"))
def from_counts(
    counts: jax.Array,
    table: jax.Array,
    batch: Batch,
    tail: tuple[jax.Array, jax.Array] | None,
    *,
    names: tuple[str, ...],
    widths: tuple[tuple[str, int], ...],
    levels: tuple[float, ...],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """As `resample`, of resamples [B, N] that were drawn; `tail`: its returns and weights."""
    policies = batch.log_weight.shape[0]
    stays = counts.shape[-1]
    size = weights.even(stays)

    def add(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        drawn = weights.take(counts, number, size) * weights.fresh(stays, number, size)
        return total + drawn @ weights.take(table, number, size, 0), None

    start = jnp.zeros((len(counts), table.shape[-1]), table.dtype)
    total, _ = jax.lax.scan(add, start, weights.numbers(stays, size))
    means = (total / stays).reshape(len(counts), policies, -1)
    values = evaluate_means(split(means, dict(widths)), batch, names)
    return values, None if tail is None else tail_statistics(*tail, counts, levels)


def resample(
    key: jax.Array,
    batch: Batch,
    table: Float[Array, "N KS"],
    widths: dict[str, int],
    names: Sequence[str],
    *,
    resamples: int,
    tail: Tail | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Values of the estimators in bootstrap resamples of stays.

    Args:
      key: consumed.
      batch: all stays.
      table, widths: from `join`.
      names: E estimators.
      resamples: B.
      tail: for quantiles and CVaR of the return from the same resamples.

    Returns:
      [B, K, E] values, and [B, K + 1, L] quantiles and CVaR where asked for; NaN where a resample
      leaves a value undefined.
    """
    stays = table.shape[0]
    rng = generator(key)
    chunk = int(np.clip(_COUNTS // stays, 1, min(_RESAMPLES, resamples)))
    parts = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        counts = draw_counts(rng, size, stays)
        if size < chunk:  # one compiled program for all chunks
            counts = np.pad(counts, ((0, chunk - size), (0, 0)), constant_values=1)
        part = from_counts(
            counts, table, batch,
            None if tail is None else (tail.returns, tail.weights),
            names=tuple(names), widths=tuple(widths.items()),
            levels=() if tail is None else tail.levels,
        )  # fmt: skip
        parts.append(jax.tree.map(lambda leaf, size=size: np.asarray(leaf)[:size], part))
    joined: tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None] = jax.tree.map(
        lambda *leaves: np.concatenate(leaves), *parts
    )
    return joined


def make_tail(batch: Batch, levels: Sequence[float]) -> Tail:
    """Inputs of the distributional estimators from a batch sorted by return."""
    final = scaled(batch.log_weight[..., -1], -1)
    return Tail(batch.returns, jnp.concatenate([final, jnp.ones_like(final[:1])]), tuple(levels))


def influence(
    batch: Batch, table: Float[Array, "N KS"], widths: dict[str, int], names: Sequence[str]
) -> Float[Array, "N K E"]:
    """[N, K, E] influence of each stay: the gradient of f times (x_i - mean x).

    The delta method's standard error is the root of sum_i influence^2 / N^2.
    """
    stays, policies = table.shape[0], batch.log_weight.shape[0]
    mean = table.mean(0).reshape(policies, -1)

    def total(means: jax.Array) -> jax.Array:
        return evaluate_means(split(means, widths), batch, names).sum(0)

    gradient = jax.jacrev(total)(mean)  # [E, K, S]
    centred = table.reshape(stays, policies, -1) - mean
    return jnp.einsum("nks,eks->nke", centred, gradient)


def leave_one_out(
    batch: Batch, table: Float[Array, "N KS"], widths: dict[str, int], names: Sequence[str]
) -> Float[Array, "N K E"]:
    """[N, K, E] values without each stay, from sums less one row."""
    stays, policies = table.shape[0], batch.log_weight.shape[0]
    total = table.sum(0)

    def without(rows: jax.Array) -> jax.Array:
        means = ((total - rows) / (stays - 1)).reshape(policies, -1)
        return evaluate_means(split(means, widths), batch, names)

    values: jax.Array = jax.lax.map(without, table, batch_size=min(stays, 4096))
    return values


def tail_statistics(
    returns: Float[Array, " N"],
    weights: Float[Array, "K N"],
    counts: Num[Array, "B N"],
    levels: Sequence[float],
) -> tuple[Float[Array, "B K L"], Float[Array, "B K L"]]:
    """Quantiles and lower CVaR of resamples, exactly, without a running sum over all stays.

    Sums over slices of about sqrt(N) stays find the slice of the quantile, and only that slice is
    summed stay by stay.

    Args:
      returns: [N] ascending.
      weights: [K, N] final weights, up to a factor.
      counts: [B, N] how often each stay was drawn.
      levels: L shares in (0, 1].

    Returns:
      [B, K, L] quantiles and CVaR; NaN where a resample has no weight.
    """
    stays, policies = returns.shape[0], weights.shape[0]
    size = max(int(stays**0.5), 1)
    slices = numbers(stays, size)
    both = jnp.concatenate([weights, weights * returns])

    def sums(which: jax.Array) -> jax.Array:
        drawn = take(counts, which, size) * fresh(stays, which, size)
        return drawn @ take(both, which, size).T

    running = jax.lax.map(sums, slices).cumsum(0)  # [slices, B, 2 K]
    mass, gain = jnp.split(jnp.moveaxis(running, 0, -1), [policies], 1)
    total = mass[..., -1]

    def of_policy(which: jax.Array, drawn: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
        """Returns and drawn weights [n] in a slice of one resample and policy."""
        drawn = take(drawn, which, size) * fresh(stays, which, size)
        return take(returns, which, size), drawn * take(weight, which, size)

    every = jax.vmap(jax.vmap(of_policy, (0, None, 0)), (0, 0, None))

    def at(level: float) -> tuple[jax.Array, jax.Array]:
        goal = level * total  # [B, K]
        which = jnp.minimum((mass < goal[..., None]).sum(-1), len(slices) - 1)
        before_mass, before_gain = _before(mass, which), _before(gain, which)
        g, weight = every(which, counts, weights)  # [B, K, n]
        passed = before_mass[..., None] + weight.cumsum(-1)
        place = jnp.minimum((passed < goal[..., None]).sum(-1), g.shape[-1] - 1)
        quantile = jnp.take_along_axis(g, place[..., None], -1)[..., 0]
        earlier = jnp.arange(g.shape[-1]) < place[..., None]
        lost_mass = before_mass + jnp.where(earlier, weight, 0.0).sum(-1)
        lost_gain = before_gain + jnp.where(earlier, weight * g, 0.0).sum(-1)
        cvar = (lost_gain + (goal - lost_mass) * quantile) / jnp.where(goal > 0, goal, 1.0)
        undefined = total <= 0
        return jnp.where(undefined, jnp.nan, quantile), jnp.where(undefined, jnp.nan, cvar)

    pairs = [at(level) for level in levels]
    return jnp.stack([p[0] for p in pairs], -1), jnp.stack([p[1] for p in pairs], -1)


def _before(running: jax.Array, which: jax.Array) -> jax.Array:
    """The running sum up to the slice before; 0 for the first."""
    index = jnp.maximum(which - 1, 0)[..., None]
    return jnp.where(which > 0, jnp.take_along_axis(running, index, -1)[..., 0], 0.0)


def cdf(
    returns: Float[Array, " N"], weights: Float[Array, "K N"], at: Float[Array, " X"]
) -> Float[Array, "K X"]:
    """[K, X] F at the points `at` [X]."""
    below = (returns[:, None] <= at).astype(weights.dtype)
    return weights @ below / weights.sum(-1, keepdims=True)
