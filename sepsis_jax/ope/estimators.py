"""Estimators of a policy's value, each a function of column means over stays.

Writing V = f(mean_i x_i) with a few columns x_i per stay makes everything else one thing for all
estimators: a resample is counts @ columns, the jackknife leaves one row out of the sum, the delta
method is the gradient of f, and ratio estimators re-normalise by construction.

Notation: K policies, N stays, T steps; g discount, w_it cumulative weight (frozen after the end),
D_t = sum_j w_jt, Q_it = Q(s_it, a_it), V_it = sum_a pi(a | s_it) Q(s_it, a), both 0 after the end;
the temporal difference is d_it = r_it - Q_it + g V_i,t+1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sepsis_jax.ope import weights as w
from sepsis_jax.ope.data import OPEData
from worldmodel import struct
from worldmodel.errors import InputError


class Values(NamedTuple):
    """Fitted values of K policies, 0 after the end of a stay."""

    q: jax.Array  # [K, N, T] Q(s_t, a_t)
    v: jax.Array  # [K, N, T] V(s_t)


@dataclass(frozen=True)
class Shrinkage:
    """Tuning of the estimators between DR and DM, in units of the cumulative weight.

    Attributes:
      switch: largest weight whose correction "switch" uses.
      optimistic: lambda of "dr_os", w <- lambda w / (w^2 + lambda).
      sub_gaussian: lambda of "dr_sg", w <- w / (1 - lambda + lambda w).
    """

    switch: float = 10.0
    optimistic: float = 100.0
    sub_gaussian: float = 0.05


@struct.dataclass
class Batch:
    """All that estimators look at."""

    reward: jax.Array  # [N, T], 0 after the end
    alive: jax.Array  # [N, T] bool
    discount: jax.Array  # [T] g^t
    log_weight: jax.Array  # [K, N, T]
    gamma: jax.Array  # []
    values: Values | None = None
    mrdr_values: Values | None = None
    drug_log_weight: jax.Array | None = None  # [K, 2, N, T]
    marginal: jax.Array | None = None  # [K, N, T] mu_t, marginal state-action ratio
    magic: jax.Array | None = None  # [K, T] share of blends that reach step t
    shrinkage: Shrinkage = struct.field(pytree_node=False, default=Shrinkage())

    @property
    def returns(self) -> Float[Array, " N"]:
        """[N] sum_t g^t r_t."""
        return (self.reward * self.discount).sum(-1)


def make_batch(
    data: OPEData,
    log_weight: Float[Array, "K N T"],
    *,
    gamma: float = 1.0,
    shrinkage: Shrinkage | None = None,
    **optional: jax.Array | Values | None,
) -> Batch:
    """A batch from recorded stays and log weights; `optional` are the further fields."""
    return Batch(
        reward=data.reward,
        alive=data.alive,
        discount=gamma ** jnp.arange(data.num_steps, dtype=jnp.float32),
        log_weight=log_weight,
        gamma=jnp.float32(gamma),
        shrinkage=shrinkage or Shrinkage(),
        **optional,  # type: ignore[arg-type]
    )


Means = dict[str, jax.Array]  # [..., K, S] by block


@dataclass(frozen=True)
class Estimator:
    """One estimator.

    Attributes:
      blocks: names of the columns it needs.
      value: column means [..., K, S] by block, and the batch, to values [..., K].
      needs: optional fields of `Batch` that it requires.
      linear: the mean over stays of one number each, so bounds for means apply.
      weighted: leans on importance weights, so their diagnostics apply.
      modelled: leans on fitted values being right, so their check applies.
      caveat: why its interval is never to be trusted by itself; empty where it may be.
    """

    blocks: tuple[str, ...]
    value: Callable[[Means, Batch], jax.Array]
    needs: tuple[str, ...] = ()
    linear: bool = False
    weighted: bool = True
    modelled: bool = False
    caveat: str = ""


# --- columns -----------------------------------------------------------------------------------


def _per_stay(values: jax.Array) -> jax.Array:
    return values[..., None]


def _difference(batch: Batch, values: Values | None) -> jax.Array:
    """[K, N, T] temporal differences d_it."""
    assert values is not None
    after = jnp.concatenate([values.v[..., 1:], jnp.zeros_like(values.v[..., :1])], -1)
    return batch.reward - values.q + batch.gamma * after


def _corrected(batch: Batch, values: Values | None, weight: jax.Array) -> jax.Array:
    """[K, N, 1] V_i0 + sum_t g^t weight_t d_t: doubly robust in its temporal-difference form."""
    assert values is not None
    correction = (batch.discount * weight * _difference(batch, values)).sum(-1)
    return _per_stay(values.v[..., 0] + correction)


def _pdis(batch: Batch, log_weight: jax.Array) -> jax.Array:
    return (batch.discount * w.linear(log_weight) * batch.reward).sum(-1)


def _switched(batch: Batch) -> jax.Array:
    weight = w.linear(batch.log_weight)
    used = jnp.where(weight <= batch.shrinkage.switch, weight, 0.0)
    return _corrected(batch, batch.values, used)


def _optimistic(batch: Batch) -> jax.Array:
    # lambda w / (w^2 + lambda) = lambda / (w + lambda / w), which cannot overflow.
    weight, rate = w.linear(batch.log_weight), batch.shrinkage.optimistic
    shrunk = rate / (weight + rate / jnp.where(weight > 0, weight, 1.0))
    return _corrected(batch, batch.values, jnp.where(weight > 0, shrunk, 0.0))


def _sub_gaussian(batch: Batch) -> jax.Array:
    weight, rate = w.linear(batch.log_weight), batch.shrinkage.sub_gaussian
    return _corrected(batch, batch.values, weight / (1.0 - rate + rate * weight))


def _marginal(batch: Batch) -> jax.Array:
    assert batch.marginal is not None
    return _per_stay((batch.discount * batch.marginal * batch.reward).sum(-1))


def _factored(batch: Batch) -> jax.Array:
    assert batch.drug_log_weight is not None
    return _per_stay(_pdis(batch, batch.drug_log_weight.sum(1)))


def _decomposed(batch: Batch) -> jax.Array:
    assert batch.drug_log_weight is not None
    return _per_stay(_pdis(batch, batch.drug_log_weight).mean(1))


def _alive_weight(batch: Batch) -> jax.Array:
    return w.scaled(jnp.where(batch.alive, batch.log_weight, -jnp.inf))


def _weight_end(batch: Batch) -> jax.Array:
    return _per_stay(w.scaled(batch.log_weight[..., -1], -1))


_BLOCKS: dict[str, Callable[[Batch], jax.Array]] = {
    "return": lambda b: jnp.broadcast_to(
        b.returns[:, None], (b.log_weight.shape[0], b.returns.shape[0], 1)
    ),
    "is": lambda b: _per_stay(w.linear(b.log_weight[..., -1]) * b.returns),
    "weight_end": _weight_end,
    "weighted_return": lambda b: _weight_end(b) * b.returns[:, None],
    "pdis": lambda b: _per_stay(_pdis(b, b.log_weight)),
    "weighted_reward": lambda b: b.discount * w.scaled(b.log_weight) * b.reward,
    "weight": lambda b: w.scaled(b.log_weight),
    "alive_reward": lambda b: b.discount * _alive_weight(b) * b.reward,
    "alive_weight": lambda b: _alive_weight(b),
    "first_value": lambda b: _per_stay(b.values.v[..., 0]),  # type: ignore[union-attr]
    "weighted_difference": lambda b: b.discount * w.scaled(b.log_weight) * _difference(b, b.values),
    "dr": lambda b: _corrected(b, b.values, w.linear(b.log_weight)),
    "mrdr": lambda b: _corrected(b, b.mrdr_values, w.linear(b.log_weight)),
    "switch": _switched,
    "dr_os": _optimistic,
    "dr_sg": _sub_gaussian,
    "factored": _factored,
    "decomposed": _decomposed,
    "mis": _marginal,
    "drl": lambda b: _corrected(b, b.values, b.marginal),  # type: ignore[arg-type]
}


def columns(batch: Batch, names: Sequence[str]) -> dict[str, jax.Array]:
    """[K, N, S] columns by block, in order of name, of what the estimators `names` need."""
    wanted = {block for name in names for block in ESTIMATORS[name].blocks}
    return {block: _BLOCKS[block](batch) for block in sorted(wanted)}


# --- values ------------------------------------------------------------------------------------


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Quotient; NaN where no stay has weight, so that undefined values are seen and counted."""
    defined = denominator > 0
    return jnp.where(defined, numerator / jnp.where(defined, denominator, 1.0), jnp.nan)


def _mean_of(block: str) -> Callable[[Means, Batch], jax.Array]:
    return lambda means, batch: means[block][..., 0]


def _wis(means: Means, batch: Batch) -> jax.Array:
    return _ratio(means["weighted_return"], means["weight_end"])[..., 0]


def _wpdis(means: Means, batch: Batch) -> jax.Array:
    return _ratio(means["weighted_reward"], means["weight"]).sum(-1)


def _wpdis_alive(means: Means, batch: Batch) -> jax.Array:
    # A resample may hold no stay that lasts until t: that step then adds nothing.
    numerator, alive = means["alive_reward"], means["alive_weight"]
    present = alive > 0
    terms = jnp.where(present, numerator / jnp.where(present, alive, 1.0), 0.0)
    return jnp.where(present[..., 0], terms.sum(-1), jnp.nan)


def _wdr(means: Means, batch: Batch) -> jax.Array:
    corrections = _ratio(means["weighted_difference"], means["weight"])
    return means["first_value"][..., 0] + corrections.sum(-1)


def _magic(means: Means, batch: Batch) -> jax.Array:
    assert batch.magic is not None
    corrections = _ratio(means["weighted_difference"], means["weight"])
    return means["first_value"][..., 0] + (batch.magic * corrections).sum(-1)


def _one(
    block: str, *needs: str, weighted: bool = True, modelled: bool = False, caveat: str = ""
) -> Estimator:
    return Estimator((block,), _mean_of(block), needs, True, weighted, modelled, caveat)


_FITTED = "its interval leaves out the error of the fitted values"
_SHRUNK = "large weights are held back, and its interval leaves out the error of the fitted values"
_RATIOS = "its interval leaves out the error of the fitted ratios"
_DRUGS = "exact only if the clinician and the policy choose the two drugs independently"


_WDR_BLOCKS = ("first_value", "weighted_difference", "weight")

ESTIMATORS: dict[str, Estimator] = {
    # mean_i G_i: the value of the recorded treatment, whatever the policy.
    "on_policy": _one("return", weighted=False),
    # (1/N) sum_i w_i G_i (Precup, Sutton & Singh 2000).
    "is": _one("is"),
    # sum_i w_i G_i / sum_i w_i.
    "wis": Estimator(("weighted_return", "weight_end"), _wis),
    # (1/N) sum_i sum_t g^t w_it r_it (Precup et al. 2000).
    "pdis": _one("pdis"),
    # sum_t g^t sum_i w_it r_it / D_t, ended stays kept in D_t (CWPDIS; Thomas 2015).
    "wpdis": Estimator(
        ("weighted_reward", "weight"),
        _wpdis,
        caveat="its interval leaves out the bias of normalising each step by itself",
    ),
    # The same with D_t over stays still in the unit: not bounded by the largest return.
    "wpdis_alive": Estimator(
        ("alive_reward", "alive_weight"), _wpdis_alive, caveat="not an estimate of the value"
    ),
    # (1/N) sum_i V(s_i0).
    "dm": _one("first_value", "values", weighted=False, modelled=True, caveat=_FITTED),
    # (1/N) sum_i [V_i0 + sum_t g^t w_it d_it] (Jiang & Li 2016).
    "dr": _one("dr", "values"),
    # mean V_i0 + sum_t g^t sum_i w_it d_it / D_t (Thomas & Brunskill 2016).
    "wdr": Estimator(_WDR_BLOCKS, _wdr, ("values",)),
    # Blend of j-step WDR returns (Thomas & Brunskill 2016); weights: `ope.fitted`.
    "magic": Estimator(
        _WDR_BLOCKS,
        _magic,
        ("values", "magic"),
        modelled=True,
        caveat="its interval leaves out the error of the fitted values and of the blend",
    ),
    # DR with the values of least variance (Farajtabar, Chow & Ghavamzadeh 2018).
    "mrdr": _one("mrdr", "mrdr_values"),
    # DR that drops corrections of weight above a bound (Wang, Agarwal & Dudik 2017, per step).
    "switch": _one("switch", "values", modelled=True, caveat=_SHRUNK),
    # DR with optimistic shrinkage of the weights (Su, Dimakopoulou, Krishnamurthy & Dudik 2020).
    "dr_os": _one("dr_os", "values", modelled=True, caveat=_SHRUNK),
    # DR with sub-Gaussian weights (Metelli, Russo & Restelli 2021).
    "dr_sg": _one("dr_sg", "values", modelled=True, caveat=_SHRUNK),
    # PDIS with w = w^vasopressor x w^fluid, exact if the drugs are chosen independently.
    "factored_is": _one("factored", "drug_log_weight", caveat=_DRUGS),
    # Half the reward credited to each drug's own ratio (Rebello et al. 2023): biased unless the
    # reward splits that way.
    "decomposed_is": _one(
        "decomposed", "drug_log_weight", caveat="biased unless the reward splits by drug"
    ),
    # (1/N) sum_it g^t mu_t r_it, mu the marginal state-action ratio (Xie, Ma & Wang 2019).
    "mis": _one("mis", "marginal", caveat=_RATIOS),
    # (1/N) sum_i [V_i0 + sum_t g^t mu_t d_it] (Kallus & Uehara 2020).
    "drl": _one("drl", "values", "marginal", caveat=_RATIOS),
}


def check_names(names: Sequence[str], batch: Batch | None = None) -> None:
    """Refuses unknown estimators, and ones whose ingredients the batch lacks."""
    for name in names:
        if name not in ESTIMATORS:
            raise InputError(f"estimator {name!r} is unknown; known: {', '.join(ESTIMATORS)}")
        missing = [n for n in ESTIMATORS[name].needs if batch and getattr(batch, n) is None]
        if missing:
            raise InputError(f"estimator {name!r} needs {', '.join(missing)}; see docs/ope.md")


def evaluate_means(means: Means, batch: Batch, names: Sequence[str]) -> Float[Array, "*b K E"]:
    """[..., K, E] values of estimators from column means [..., K, S]."""
    return jnp.stack([ESTIMATORS[name].value(means, batch) for name in names], -1)


def estimate(batch: Batch, names: Sequence[str]) -> dict[str, jax.Array]:
    """[K] point values by estimator."""
    check_names(names, batch)
    means = {block: values.mean(1) for block, values in columns(batch, names).items()}
    return {name: ESTIMATORS[name].value(means, batch) for name in names}


def recursive_dr(batch: Batch, log_ratio: Float[Array, "K N T"]) -> Float[Array, " K"]:
    """[K] doubly robust value by the backward recursion of Jiang & Li (2016).

    DR_T = 0, DR_t = V_t + rho_t (r_t + g DR_t+1 - Q_t); equals "dr" where weights are unclipped.

    Args:
      batch: with values.
      log_ratio: [K, N, T] of the steps.
    """
    assert batch.values is not None

    def step(after: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        reward, log_rho, q, v = inputs
        return v + jnp.exp(log_rho) * (reward + batch.gamma * after - q), None

    steps = (batch.reward.T[:, None], *(jnp.moveaxis(x, -1, 0) for x in (log_ratio, *batch.values)))
    start = jnp.zeros(log_ratio.shape[:-1])
    total, _ = jax.lax.scan(step, start, steps, reverse=True)
    return total.mean(-1)
