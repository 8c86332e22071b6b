"""Action probabilities of target policies: built in, from tables, softened."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float

from policy import registry
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import read_table

PROBABILITY_COLUMNS = tuple(f"action_{a}" for a in range(schema.NUM_ACTIONS))


def built_in(
    name: str, episodes: Episodes, behavior_probs: np.ndarray | None
) -> np.ndarray | jax.Array:
    """[N, T, 25] probabilities of "clinician" or a simple policy of `policy.registry`."""
    if name != registry.CLINICIAN:
        return registry.make(name).action_probs(episodes)
    if behavior_probs is None:
        raise InputError(
            "policy 'clinician' needs the clinician's probabilities of all actions; give "
            "`behavior` as a table, or a model to fit"
        )
    return behavior_probs


def read_probabilities(path: Path, episodes: Episodes) -> Float[np.ndarray, "N T 25"]:
    """[N, T, 25] from a CSV or Parquet table with stay_id, step, action_0 ... action_24.

    Rows of stays that are not among the episodes are ignored; every recorded step needs a row.
    Values are checked later, by `sepsis_jax.ope.data.check`.

    Raises:
      InputError: the file cannot be read, a column or a step is missing, or a row comes twice.
    """
    table = read_table(path)
    needed = ("stay_id", "step", *PROBABILITY_COLUMNS)
    missing = [column for column in needed if column not in table.columns]
    if missing:
        raise InputError(
            f"{path}: columns missing: {', '.join(missing[:4])}{' ...' if missing[4:] else ''}; "
            "expected stay_id, step, action_0 ... action_24 (5 x vasopressor + fluid level)"
        )
    try:
        probs = table[list(PROBABILITY_COLUMNS)].to_numpy(np.float32)
    except (TypeError, ValueError):
        raise InputError(f"{path}: holds values that are not numbers") from None
    keys = np.stack([_whole(table[name], path) for name in ("stay_id", "step")], 1)
    ids = np.asarray(episodes.stay_id)
    order = np.argsort(ids, kind="stable")
    place = np.minimum(np.searchsorted(ids[order], keys[:, 0]), len(ids) - 1)
    row = order[place]
    length = np.asarray(episodes.length)
    use = (ids[row] == keys[:, 0]) & (keys[:, 1] >= 0) & (keys[:, 1] < length[row])
    row, step = row[use], keys[use, 1]
    seen = np.zeros((episodes.num_stays, episodes.num_steps), np.int32)
    np.add.at(seen, (row, step), 1)
    absent = np.asarray(episodes.valid) & (seen == 0)
    for bad, what in ((seen > 1, "comes twice"), (absent, "has no row")):
        if bad.any():
            i, t = np.argwhere(bad)[0]
            raise InputError(f"{path}: step {t} of stay {ids[i]} {what} ({bad.sum()} such steps)")
    out = np.full((*seen.shape, schema.NUM_ACTIONS), 1.0 / schema.NUM_ACTIONS, np.float32)
    out[row, step] = probs[use]
    return out


def _whole(column: pd.Series, path: Path) -> np.ndarray:
    """[M] int64 of a column; numbers with a fraction are refused, not cut."""
    try:
        if pd.api.types.is_integer_dtype(column):
            return np.asarray(column.to_numpy(np.int64))
        values: np.ndarray = column.to_numpy(np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"{path}: column {column.name} holds values that are not numbers"
        ) from None
    broken = ~np.isfinite(values) | (values != np.round(values))
    if broken.any():
        raise InputError(
            f"{path}: column {column.name} holds {values[broken][0]:g} in row "
            f"{int(broken.argmax())}; expected whole numbers"
        )
    return np.asarray(values, np.int64)


def write_probabilities(
    path: Path, episodes: Episodes, probs: Float[np.ndarray | Array, "N T 25"]
) -> None:
    """Writes [N, T, 25] probabilities as the table that `read_probabilities` reads."""
    stay, step = np.nonzero(np.asarray(episodes.valid))
    table = pd.DataFrame(np.asarray(probs)[stay, step], columns=list(PROBABILITY_COLUMNS))
    table.insert(0, "stay_id", np.asarray(episodes.stay_id)[stay])
    table.insert(1, "step", step)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path, index=False)


SOFTENINGS = ("none", "uniform", "clinician")


def check_softening(rule: str, share: float) -> None:
    """Refuses an unknown rule of `soften`, or a share outside [0, 1]."""
    if rule not in SOFTENINGS:
        raise InputError(f"soften: got {rule!r}, expected one of {', '.join(SOFTENINGS)}")
    if not 0 <= share <= 1:
        raise InputError(f"soften_share: got {share}, expected within [0, 1]")


def soften(
    probs: jax.Array | np.ndarray,
    rule: str,
    share: float,
    behavior_probs: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """Makes a (nearly) deterministic policy stochastic, by a named rule.

    "uniform": (1 - e) pi + e / A (AI Clinician and Tang & Wiens 2021 spread e over the other
    actions; the difference is e / A on the chosen one). "clinician": (1 - e) pi + e b (Tang et
    al. 2022). "none": pi itself.
    """
    check_softening(rule, share)
    probs = jnp.asarray(probs)
    if rule == "none":
        return probs
    if rule == "uniform":
        return (1 - share) * probs + share / probs.shape[-1]
    if behavior_probs is None:
        raise InputError("soften 'clinician' needs the clinician's probabilities of all actions")
    return (1 - share) * probs + share * jnp.asarray(behavior_probs)
