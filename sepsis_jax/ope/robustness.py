"""Sensitivity analyses: unmeasured confounding, and subgroups of patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float

from sepsis_jax.ope.data import OPEData
from sepsis_jax.ope.evaluate import evaluate
from sepsis_jax.ope.fitted import Fitted
from sepsis_jax.ope.weights import scaled
from worldmodel import schema
from worldmodel.clinical.rules import LACTATE_LIMIT, MAP_TARGET
from worldmodel.episodes import Episodes

GAMMAS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)


def worst_case(
    returns: Float[Array, " N"], log_weight: Float[Array, "K N"], gamma: jax.Array | float
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """[K] least and greatest WIS value when every weight may be wrong by a factor of `gamma`.

    Args:
      returns: [N].
      log_weight: [K, N] final log weights.
      gamma: at least 1.
    """
    order = jnp.argsort(returns)
    g = returns[order]
    weight = scaled(log_weight, -1)[:, order]

    def extreme(first: float | jax.Array, rest: float | jax.Array) -> jax.Array:
        """[K, N + 1] values with the j lowest returns weighted by `first`, others by `rest`."""
        mass = jnp.pad(jnp.cumsum(weight, -1), ((0, 0), (1, 0)))
        gain = jnp.pad(jnp.cumsum(weight * g, -1), ((0, 0), (1, 0)))
        total = first * mass + rest * (mass[:, -1:] - mass)
        return (first * gain + rest * (gain[:, -1:] - gain)) / total

    undefined = jnp.isneginf(log_weight.max(-1))
    low, high = extreme(gamma, 1 / gamma).min(-1), extreme(1 / gamma, gamma).max(-1)
    return jnp.where(undefined, jnp.nan, low), jnp.where(undefined, jnp.nan, high)


def confounding_table(
    names: Sequence[str],
    returns: Float[Array, " N"],
    log_weight: Float[Array, "K N"],
    gammas: Sequence[float] = GAMMAS,
    trusted: Sequence[bool] | None = None,
) -> pd.DataFrame:
    """Rows (policy, Gamma) with the bounds of WIS and whether they exclude the mean return.

    Args:
      names: K policies.
      returns: [N].
      log_weight: [K, N] final log weights.
      gammas: strengths.
      trusted: [K] whether the WIS estimate is; where not, nothing is said about differing.
    """
    rows = []
    mean = float(returns.mean())
    for gamma in gammas:
        low, high = worst_case(returns, log_weight, gamma)
        for k, name in enumerate(names):
            bounds = float(low[k]), float(high[k])
            slack = 1e-5 * (1 + abs(mean))
            differs: bool | None = bounds[1] < mean - slack or bounds[0] > mean + slack
            if trusted is not None and not trusted[k]:
                differs = None
            rows.append((name, float(gamma), *bounds, differs))
    columns = ["policy", "confounding", "low", "high", "differs_from_clinician"]
    return pd.DataFrame(rows, columns=columns).sort_values(["policy", "confounding"], kind="stable")


SMALLEST = 30  # stays; smaller groups are named but not evaluated


def groups(episodes: Episodes) -> dict[str, np.ndarray]:
    """[N] masks by name: age, sex, SOFA of the first row; the rest at any time in 24 hours."""
    first = np.asarray(episodes.valid) & (np.arange(episodes.num_steps) < 6)
    dynamic = np.asarray(episodes.dynamic)
    treated = np.asarray(episodes.vasopressor) > 0
    low = dynamic[..., schema.INDEX["meanbp"]] < MAP_TARGET
    acid = dynamic[..., schema.INDEX["lactate"]] > LACTATE_LIMIT
    shock = (first & treated & (low | acid)).any(1)
    ventilated = (first & np.asarray(episodes.ventilated)).any(1)
    return {
        **_people(episodes),
        "shock": shock,
        "no shock": ~shock,
        "ventilated": ventilated,
        "not ventilated": ~ventilated,
        f"lactate > {LACTATE_LIMIT:g} mmol/L": (first & acid).any(1),
        f"lactate <= {LACTATE_LIMIT:g} mmol/L": ~(first & acid).any(1),
        **_severity(episodes),
    }


def groups_at(episodes: Episodes, step: int) -> dict[str, np.ndarray]:
    """[N] masks by name, of what is known in the row `step`, which all stays reach."""
    charlson = np.asarray(episodes.static)[:, 2]
    low = np.asarray(episodes.dynamic)[:, step, schema.INDEX["meanbp"]] < MAP_TARGET
    before = np.asarray(episodes.vasopressor)[:, :step]
    shock = low | (before[:, -1:] > 0).any(1)
    burden = float(np.median(charlson))
    return {
        "all": np.ones(episodes.num_stays, bool),
        **_people(episodes),
        f"Charlson index <= {burden:g}": charlson <= burden,
        f"Charlson index > {burden:g}": charlson > burden,
        **_severity(episodes),
        "shock": shock,
        "no shock": ~shock,
    }


def _people(episodes: Episodes) -> dict[str, np.ndarray]:
    """[N] masks by name: age and sex."""
    age, male, _ = np.asarray(episodes.static).T
    return {
        "age < 65": age < 65,
        "age >= 65": age >= 65,
        "female": male == 0,
        "male": male == 1,
    }


def _severity(episodes: Episodes) -> dict[str, np.ndarray]:
    """[N] masks by name: SOFA of the first row."""
    score = np.asarray(episodes.sofa)[:, 0]
    return {
        "SOFA at admission < 6": score < 6,
        "SOFA at admission 6 to 9": (score >= 6) & (score < 10),
        "SOFA at admission >= 10": score >= 10,
    }


def evaluate_groups(
    data: OPEData,
    target_probs: Mapping[str, jax.Array | np.ndarray],
    masks: Mapping[str, np.ndarray],
    *,
    key: jax.Array,
    fitted: Fitted | None = None,
    alpha: float = 0.05,
    **options: Any,  # passed on to `evaluate` as they are
) -> pd.DataFrame:
    """Rows as `evaluate` returns them, with `group`, `stays` and an adjusted verdict.

    `differs` says whether the interval of the difference from the clinician excludes 0 at level
    alpha; `differs_adjusted` the same at alpha divided by the number of groups and policies
    (Bonferroni), which is what may be claimed after looking at all of them. Both are undefined
    where the estimate is not trusted.
    """
    tests = max(len(masks) * len(target_probs), 1)
    tables = []
    for number, (name, mask) in enumerate(masks.items()):
        stays = int(mask.sum())
        if stays < SMALLEST:
            row = {"group": name, "stays": stays, "trust": False, "reason": "too few stays"}
            row |= {"differs": np.nan, "differs_adjusted": np.nan}
            tables.append(pd.DataFrame([row]))
            continue
        # Steps stay as they are: fitted ingredients are aligned with them.
        index = np.flatnonzero(mask)
        part = data.select(index)
        probs = {policy: np.asarray(p)[index] for policy, p in target_probs.items()}
        own = None if fitted is None else fitted.select(index, data.num_steps)
        if own is not None:
            own = replace(own, clinician_value=None)
        key_of_group = jax.random.fold_in(key, number)
        shared = partial(
            evaluate, part, probs, key=key_of_group, fitted=own, tail_levels=(), **options
        )
        table, strict = shared(alpha=alpha), shared(alpha=alpha / tests)
        table.insert(0, "group", name)
        table.insert(1, "stays", stays)
        table["differs"] = _excludes_zero(table)
        table["differs_adjusted"] = _excludes_zero(strict)
        table.loc[~table["trust"], ["differs", "differs_adjusted"]] = np.nan
        tables.append(table)
    result = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    result.attrs = {"tests": tests, "alpha": alpha, "alpha_adjusted": alpha / tests}
    return result


def _excludes_zero(table: pd.DataFrame) -> pd.Series:
    found = (table["difference_low"] > 0) | (table["difference_high"] < 0)
    return found.astype(object)
