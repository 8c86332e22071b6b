"""Truth benchmark of policy values: in the learned world, in truth, and estimated from records.

Fresh patients of the synthetic world are treated by a policy from admission on, in truth and, from
the same first rows, in the learned world. Where records are given, off-policy evaluation
estimates the same value from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from policy.base import Policy
from policy.registry import find_all
from sepsis_jax.ope.intervals import mean_of
from sepsis_jax.ope.simulated import simulated_value
from sepsis_jax.pipelines.futures import rank
from sepsis_jax.pipelines.ope import evaluate_policies
from sepsis_jax.pipelines.ope_estimates import OPEOptions
from sepsis_jax.pipelines.policies import patients_per_call
from sepsis_jax.pipelines.policy_values import TrueWorld
from sepsis_jax.runs import Progress, provenance, silent
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, write_json
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.world_model import WorldModel
from worldmodel.synthetic import generate

ESTIMATORS = ("wis", "wdr")
_TIE = 2.0  # standard errors of a difference within which two true values are tied


def compare_values(
    model: str | Path,
    out: str | Path,
    policies: Sequence[str],
    world: TrueWorld,
    *,
    samples: int = 2,
    records: str | Path | None = None,
    progress: Progress = silent,
) -> tuple[pd.DataFrame, dict[str, object]]:
    """Compares values of policies; writes values.csv, metrics.json, and `ope` where estimated.

    Args:
      model: folder of a world model trained in the synthetic world.
      out: folder to write.
      policies: built-in names or NAME=FOLDER.
      world: fresh patients, of another seed than the training data's.
      samples: futures per patient and ensemble member.
      records: folder of episodes to estimate the same values from.
      progress: called with (phase, share done).

    Raises:
      InputError: an unknown or repeated policy, or fewer than two.
    """
    named = find_all(policies)
    if len(named) < 2:
        raise InputError("policy: give two or more, whose values can be compared")
    table = value_table(load_world_model(model), named, world, samples=samples, progress=progress)
    metrics = value_metrics(table)
    with atomic_folder(Path(out), marker="values.csv") as folder:
        if records is not None:
            progress("off-policy evaluation", 0.9)
            table = add_estimates(table, records, policies, folder / "ope", world.seed)
        table.to_csv(folder / "values.csv", index=False)
        write_json(folder / "metrics.json", metrics)
        made_from = provenance(
            model=str(model), policies=list(policies), records=str(records), **asdict(world)
        )
        write_json(folder / "manifest.json", made_from)
    progress("done", 1.0)
    return table, metrics


def value_table(
    world_model: WorldModel,
    policies: dict[str, Policy | None],
    world: TrueWorld,
    *,
    samples: int,
    progress: Progress = silent,
) -> pd.DataFrame:
    """One row per policy: its value in truth and in the learned world, on the same patients.

    Args:
      world_model: trained in the synthetic world.
      policies: None is the clinician.
      world: fresh patients.
      samples: futures per patient and ensemble member.
      progress: called with (phase, share done).

    Returns:
      Columns policy, true, true_low, true_high, simulated, simulated_low, simulated_high (95%
      intervals over patients), error, spread (SD of the members).
    """
    starts, _ = generate(
        jax.random.key(world.seed), world.patients, keep_latent=False, params=world.params()
    )
    rows = []
    for i, (name, policy) in enumerate(policies.items()):
        progress(f"value of {name}", i / len(policies))
        true = mean_of(world.outcome(policy).total)
        found = simulated_value(
            world_model,
            jax.random.key(world.seed),
            starts,
            policy,
            samples=samples * world_model.num_members,
            block=patients_per_call(policy),
        )
        simulated = mean_of(found.total)
        rows.append(
            {
                "policy": name,
                "true": true.value,
                "true_low": true.low,
                "true_high": true.high,
                "simulated": simulated.value,
                "simulated_low": simulated.low,
                "simulated_high": simulated.high,
                "error": simulated.value - true.value,
                "spread": found.spread,
            }
        )
    return pd.DataFrame(rows)


def add_estimates(
    table: pd.DataFrame, records: str | Path, policies: Sequence[str], out: Path, seed: int
) -> pd.DataFrame:
    """The table with what off-policy evaluation says from records, and its verdict.

    Args:
      table: of `value_table`.
      records: folder of episodes of the same world, treated by the clinician.
      policies: built-in names or NAME=FOLDER.
      out: folder to write the evaluation to.
      seed: of the evaluation.
    """
    options = OPEOptions(estimators=",".join(ESTIMATORS), seed=seed)
    found = evaluate_policies(records, out, policies, options=options)
    for estimator in ESTIMATORS:
        rows = found[found["estimator"] == estimator].set_index("policy")
        for column in ("estimate", "low", "high", "trust"):
            table[f"{estimator}_{column}"] = table["policy"].map(rows[column])
    return table


def value_metrics(table: pd.DataFrame) -> dict[str, object]:
    """Largest error, rank, and whether the order is right but for ties within the error."""
    true, simulated = table["true"].to_numpy(), table["simulated"].to_numpy()
    error = (table["true_high"] - table["true_low"]).to_numpy() / (2 * 1.96)
    difference = true[:, None] - true
    tied = np.abs(difference) < _TIE * np.hypot(error[:, None], error)
    agree = np.sign(difference) == np.sign(simulated[:, None] - simulated)
    return {
        "policies": len(table),
        "largest_error": float(np.abs(true - simulated).max()),
        "spearman": rank(true, simulated),
        "right_order": bool((agree | tied).all()),
    }
