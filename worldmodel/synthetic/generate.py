"""Episodes from the synthetic world with the truth behind them, and statistics of episodes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from worldmodel import keys, scaling, schema, struct
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.observation import PolicyFn
from worldmodel.resources import require_memory
from worldmodel.synthetic.latent import Latent
from worldmodel.synthetic.patients import patient_key
from worldmodel.synthetic.simulate import BLOCK, Rows, Stays, actor_of, run
from worldmodel.synthetic.world import Config, Params

_SPLIT_SHARES = (0.70, 0.15, 0.15)
_OTHERS = 16  # numbers of a row beside values, masks and probabilities
_COPIES = 4  # of what is simulated, until it is stays


@struct.dataclass
class Truth:
    """The unrecorded part of generated stays, sufficient to simulate the same patients again."""

    key: jax.Array  # the world's key
    patient: jax.Array  # [N] int32 patient numbers
    probabilities: jax.Array  # [N, T, 25] of the policy that generated; 0 on padding
    reward: jax.Array  # [N, T] float32; 0 on padding
    latent: Latent | None  # leaves [N, T, ...], start of each step; 0 on padding
    params: Params
    config: Config = struct.field(pytree_node=False)


def generate(
    key: jax.Array,
    num_patients: int,
    *,
    config: Config | None = None,
    params: Params | None = None,
    policy: PolicyFn | None = None,
    first_patient: int = 0,
    keep_latent: bool = True,
    block: int = BLOCK,
) -> tuple[Episodes, Truth]:
    """Stays under the clinician (or another policy) as Episodes, and the truth behind them.

    Patient i is the same whatever `num_patients` and `block` are.

    Args:
      key: of the world; not consumed by the call, since the same key means the same world.
      num_patients: number of stays.
      config: static settings.
      params: coefficients.
      policy: that treats; None for the clinician.
      first_patient: number of the first patient.
      keep_latent: keep latent states; about 170 bytes per patient-step.
      block: patients per call; bounds the memory.

    Raises:
      InputError: `num_patients` is below 1.
    """
    if num_patients < 1:
        raise InputError(f"number of patients is {num_patients}, expected at least 1")
    require_patients(num_patients)
    patients = np.arange(first_patient, first_patient + num_patients, dtype=np.int32)
    return generate_patients(
        key, patients, None, config=config, params=params, policy=policy,
        keep_latent=keep_latent, block=block,
    )  # fmt: skip


def require_patients(count: int) -> None:
    """Refuses more synthetic patients than memory holds.

    Raises:
      InputError: they do not fit; the message gives the number that does.
    """
    row = 4 * (2 * schema.NUM_FEATURES + schema.NUM_ACTIONS + _OTHERS)
    require_memory("patients", count, _COPIES * Config.horizon * row)


def generate_patients(
    key: jax.Array,
    patients: np.ndarray,
    plans: np.ndarray | None,
    *,
    config: Config | None = None,
    params: Params | None = None,
    policy: PolicyFn | None = None,
    keep_latent: bool = True,
    block: int = BLOCK,
) -> tuple[Episodes, Truth]:
    """`generate` for named patients [N], with the actions in `plans` [N, <=T] where not -1."""
    config, params = config or Config(), params or Params()
    stays, rows = run(
        key, patients, plans, actor_of(policy), params=params, config=config, collect=True,
        keep_latent=keep_latent, block=block,
    )  # fmt: skip
    assert rows is not None
    truth = Truth(
        key=key,
        patient=jnp.asarray(patients),
        probabilities=_zeroed(rows.probabilities, rows.valid),
        reward=_zeroed(rows.reward, rows.valid),
        latent=jax.tree.map(lambda leaf: _zeroed(leaf, rows.valid), rows.latent),
        params=params,
        config=config,
    )
    return to_episodes(key, patients, stays, rows), truth


def to_episodes(key: jax.Array, patients: np.ndarray, stays: Stays, rows: Rows) -> Episodes:
    """Episodes of simulated stays.

    `sofa` of a row counts the vasopressor that was running when the row was recorded, that is
    the dose of the step before.
    """
    vasopressor, fluid = schema.action_levels(rows.action)
    chosen = jnp.take_along_axis(
        jnp.asarray(rows.probabilities), jnp.asarray(rows.action)[..., None], -1
    )[..., 0]
    per_step = {
        "dynamic": rows.dynamic,
        "measured": rows.measured,
        "vasopressor": vasopressor,
        "fluid": fluid,
        "vasopressor_dose": rows.vasopressor_dose,
        "fluid_dose": rows.fluid_dose,
        "ventilated": rows.ventilated,
        "sofa": rows.sofa,
        "urine_24h": rows.urine_24h,
        "behavior_prob": chosen,
    }
    return Episodes(
        **{name: _zeroed(value, rows.valid) for name, value in per_step.items()},
        static=jnp.asarray(stays.static),
        length=jnp.asarray(stays.length),
        died_90d=jnp.asarray(stays.died_90d),
        died_in_hospital=jnp.asarray(stays.died_in_hospital),
        stay_id=jnp.asarray(patients),
        subject_id=jnp.asarray(patients),
        split=_splits(key, jnp.asarray(patients)),
    )


def _splits(key: jax.Array, patients: jax.Array) -> jax.Array:
    """[N] int32 index into schema.SPLITS, by the patient's key alone."""

    def one(patient: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(patient_key(key, patient), keys.SPLIT))

    limits = jnp.asarray(np.cumsum(_SPLIT_SHARES)[:-1], jnp.float32)
    return jnp.searchsorted(limits, jax.vmap(one)(patients), side="right").astype(jnp.int32)


def _zeroed(values: jax.Array, valid: jax.Array) -> jax.Array:
    keep = jnp.reshape(valid, (*valid.shape, *[1] * (values.ndim - 2)))
    return jnp.where(keep, values, jnp.zeros((), values.dtype))


# Published base excess was filtered to positive values; the world aims at physiologic ones.
EXEMPT: tuple[str, ...] = ("base_excess",)


def marginals(episodes: Episodes) -> pd.DataFrame:
    """One row per feature over all valid rows, urine as log(1 + mL).

    Columns: `mean`, `published_mean`, `shift` (difference of means in published SDs), `std`,
    `published_std`, `ratio` (of the SDs), `measured` (share of rows recorded; urine is always),
    `median` (of recorded values, schema units).
    """
    valid = np.asarray(episodes.valid)
    rows = np.asarray(episodes.dynamic)[valid].astype(np.float64)
    measured = np.asarray(episodes.measured)[valid]
    measured = np.concatenate([measured, np.ones((len(rows), 1), bool)], axis=1)
    median = [
        np.median(rows[taken, i]) if (taken := measured[:, i]).any() else np.nan
        for i in range(schema.NUM_FEATURES)
    ]
    rows[:, schema.URINE] = np.log1p(rows[:, schema.URINE])
    mean, std = rows.mean(0), rows.std(0)
    return pd.DataFrame(
        {
            "mean": mean,
            "published_mean": scaling.MEAN,
            "shift": (mean - scaling.MEAN) / scaling.STD,
            "std": std,
            "published_std": scaling.STD,
            "ratio": std / scaling.STD,
            "measured": measured.mean(0),
            "median": median,
        },
        index=list(schema.FEATURE_NAMES),
    )


def recorded_statistics(episodes: Episodes) -> pd.DataFrame:
    """One row per feature over what was recorded, of any episodes, in schema units.

    Columns: `measured` (share of rows recorded), `mean`, `std`, `low` and `high` (1% and 99%
    quantiles), `autocorrelation` (correlation of the values of two rows in a row, over all stays
    together). NaN where fewer than three values or pairs were recorded.
    """
    valid = np.asarray(episodes.valid)
    rows = np.asarray(episodes.dynamic, np.float64)
    measured = np.asarray(episodes.measured) & valid[..., None]
    measured = np.concatenate([measured, valid[..., None]], axis=-1)
    pairs = measured[:, 1:] & measured[:, :-1]
    table: dict[str, list[float]] = {}
    for i, name in enumerate(schema.FEATURE_NAMES):
        values, pair = rows[..., i][measured[..., i]], pairs[..., i]
        table[name] = [
            len(values) / valid.sum(),
            *([values.mean(), values.std()] if len(values) > 2 else [np.nan] * 2),
            *(np.quantile(values, (0.01, 0.99)) if len(values) > 2 else [np.nan] * 2),
            _correlation(rows[:, :-1, i][pair], rows[:, 1:, i][pair]),
        ]
    columns = ["measured", "mean", "std", "low", "high", "autocorrelation"]
    return pd.DataFrame.from_dict(table, orient="index", columns=columns)


def stay_statistics(episodes: Episodes, *, horizon: int = Config.horizon) -> dict[str, float]:
    """How stays of any episodes pass: shares and correlations, by name.

    `unchanged` are shares of steps after which a value is the same; `fluid_meanbp` and
    `vasopressor_meanbp` correlate the level given in a row with the MAP of that row; `full` is
    the share of stays with at least `horizon` rows.
    """
    valid, sofa = np.asarray(episodes.valid), np.asarray(episodes.sofa)
    levels = {"fluid": np.asarray(episodes.fluid), "vasopressor": np.asarray(episodes.vasopressor)}
    pressure = np.asarray(episodes.dynamic, np.float64)[..., schema.INDEX["meanbp"]][valid]
    unchanged = {
        f"{name}_unchanged": float((value[:, 1:] == value[:, :-1])[valid[:, 1:]].mean())
        for name, value in {"sofa": sofa, **levels}.items()
    }
    length = np.asarray(episodes.length)
    return {
        **unchanged,
        **{f"{k}_meanbp": _correlation(v[valid], pressure) for k, v in levels.items()},
        "full": float((length >= horizon).mean()),
        "length": float(length.mean()),
        "sofa": float(sofa[valid].mean()),
        "died_90d": float(np.asarray(episodes.died_90d).mean()),
    }


def _correlation(left: np.ndarray, right: np.ndarray) -> float:
    if len(left) < 3 or not (left.std() and right.std()):
        return float("nan")
    return float(np.corrcoef(left, right)[0, 1])
