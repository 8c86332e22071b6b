"""What policies are worth, what they prescribe, and how often that breaks a rule.

In the synthetic world values are true values, else those of a world model. `compare_with_truth`
puts both beside each other, and beside what off-policy evaluation estimates from records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from policy.base import Policy
from policy.registry import CLINICIAN, find_all
from sepsis_jax.ope.intervals import mean_of
from sepsis_jax.ope.simulated import simulated_value
from sepsis_jax.pipelines.episodes import taken
from sepsis_jax.pipelines.ope import evaluate_policies
from sepsis_jax.pipelines.ope_estimates import OPEOptions
from sepsis_jax.pipelines.policy_rates import RATES, prescribed_rates, simulated_rates
from sepsis_jax.pipelines.policy_training import patients_per_call
from sepsis_jax.report.policies import action_shares
from sepsis_jax.runs import JsonDict, Progress, provenance, silent
from worldmodel import schema
from worldmodel.clinical.reward import episode_rewards
from worldmodel.configuration import require
from worldmodel.episode_files import load_episodes
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, check_replaceable, write_json
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.rollout import require_rollouts
from worldmodel.synthetic import Config, Params, generate
from worldmodel.synthetic.generate import require_patients


class Outcome(NamedTuple):
    """What came of one policy on N patients, the same for every policy."""

    total: np.ndarray  # [N] undiscounted total reward
    died: np.ndarray | None  # [N] by day 90; None where unknown
    length: float | None  # mean steps
    rates: dict[str, float]
    shares: np.ndarray  # [5, 5] percent


@dataclass(frozen=True)
class TrueWorld:
    """Fresh synthetic patients, the same for every policy, with the same random numbers.

    `max_steps` leaves out of the total reward what comes after so many steps.
    """

    patients: int
    seed: int
    confounding: float
    max_steps: int | None = None

    def __post_init__(self) -> None:
        require(self, "at least 2", lambda count: count >= 2, "patients")
        require(self, "0 or more", lambda value: 0 <= value < math.inf, "confounding")

    def params(self) -> Params:
        """Coefficients of the world."""
        params = Params()
        clinician = replace(params.clinician, confounding=self.confounding)
        return replace(params, clinician=clinician)

    def outcome(self, policy: Policy | None) -> Outcome:
        """Of a policy; None is the clinician."""
        episodes, truth = generate(
            jax.random.key(self.seed), self.patients, policy=policy, keep_latent=False,
            config=Config(past=0 if policy is None else policy.past), params=self.params(),
            block=patients_per_call(policy),
        )  # fmt: skip
        return Outcome(
            total=np.asarray(truth.reward, np.float64)[:, : self.max_steps].sum(1),
            died=np.asarray(episodes.died_90d),
            length=float(np.mean(episodes.length)),
            rates=simulated_rates(episodes, schema.STEP_HOURS),
            shares=action_shares(taken(episodes), np.asarray(episodes.valid)),
        )


@dataclass(frozen=True, eq=False)
class ModelWorld:
    """Recorded patients simulated in a world model; rates on the recorded states."""

    world_model: WorldModel
    episodes: Episodes
    horizon: int | None  # None: whole stays
    samples: int
    seed: int
    dose_edges: schema.DoseEdges

    def outcome(self, policy: Policy | None) -> Outcome:
        """Of a policy; for the clinician (None) what the records say."""
        key_value, key_act, key_draw = jax.random.split(jax.random.key(self.seed), 3)
        episodes, step_hours = self.episodes, self.world_model.step_hours
        valid = np.asarray(episodes.valid)
        if policy is None:
            return Outcome(
                total=recorded_returns(episodes),
                died=np.asarray(episodes.died_90d),
                length=float(np.mean(episodes.length)),
                rates=simulated_rates(episodes, step_hours),
                shares=action_shares(taken(episodes), valid),
            )
        found = simulated_value(
            self.world_model, key_value, episodes, policy,
            horizon=self.horizon, samples=self.samples, block=patients_per_call(policy),
        )  # fmt: skip
        probs = policy.action_probs(episodes, key=key_act)
        rates = prescribed_rates(
            key_draw, episodes, probs, step_hours=step_hours, dose_edges=self.dose_edges
        )
        return Outcome(found.total, None, None, rates, action_shares(probs, valid))


def recorded_returns(episodes: Episodes) -> np.ndarray:
    """[N] undiscounted total reward of recorded stays."""
    total: np.ndarray = np.asarray(episode_rewards(episodes), np.float64).sum(1)
    return total


def value_table(
    outcomes: dict[str, Outcome],
    kinds: dict[str, str],
    *,
    baseline: str,
    best: str | None,
) -> pd.DataFrame:
    """One row per policy with value, paired differences, mortality and rates.

    Args:
      outcomes: by policy, of the same patients in the same order.
      kinds: of the policies; the best of kind "offline" is compared with.
      baseline: policy that `less_clinician` is the difference from.
      best: policy that marks 100% of the gap from the baseline; None for no gap.

    Raises:
      InputError: the baseline is missing.
    """
    if baseline not in outcomes:
        raise InputError(f"comparison: the baseline {baseline} is missing")
    values = {name: float(found.total.mean()) for name, found in outcomes.items()}
    offline = [name for name in outcomes if kinds[name] == "offline"]
    best_offline = max(offline, key=values.__getitem__) if offline else None
    gap = np.nan if best is None else values[best] - values[baseline]
    gap = gap if gap > 0 else np.nan  # nothing to close
    rows = []
    for name, found in outcomes.items():
        row: JsonDict = {"policy": name, "kind": kinds[name]}
        total = mean_of(found.total)
        row |= {"value": total.value, "low": total.low, "high": total.high, "value_se": total.se}
        row |= _against("less_clinician", found, outcomes[baseline], same=name == baseline)
        best_offline_outcome = None if best_offline is None else outcomes[best_offline]
        row |= _against("less_best_offline", found, best_offline_outcome, same=name == best_offline)
        row["gap_closed"] = 100.0 * (values[name] - values[baseline]) / gap
        died = None if found.died is None else mean_of(found.died.astype(np.float64))
        row["mortality"] = np.nan if died is None else 100.0 * died.value
        row["mortality_se"] = np.nan if died is None else 100.0 * died.se
        row["length"] = np.nan if found.length is None else found.length
        row |= {rate: found.rates[rate] for rate in RATES}
        rows.append(row)
    table = pd.DataFrame(rows)
    table.attrs = {"best_offline": best_offline, "baseline": baseline, "best": best}
    return table


def _against(name: str, found: Outcome, other: Outcome | None, *, same: bool) -> dict[str, float]:
    """A paired difference; of nothing from itself."""
    if other is None or same:
        return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
    gain = mean_of(found.total - other.total)
    return {name: gain.value, f"{name}_low": gain.low, f"{name}_high": gain.high}


MARKER = "values.csv"
ESTIMATORS = ("wis", "wdr")
_TIE = 2.0  # standard errors of a difference within which two true values are tied


def compare_with_truth(
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
    check_replaceable(Path(out), MARKER)
    world_model = load_world_model(model)
    if records is not None:
        load_episodes(records)  # before hours of simulation, not after
    require_patients(world.patients)
    require_rollouts(
        samples * world_model.num_members,
        patients=min(world.patients, patients_per_call(None)),
        plans=1,
        horizon=world_model.stay_steps or Config.horizon,
        features=0,
    )
    table = truth_table(world_model, named, world, samples=samples, progress=progress)
    metrics = truth_metrics(table)
    with atomic_folder(Path(out), marker=MARKER) as folder:
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


def truth_table(
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
      intervals over patients), error, spread (SD of the members), supported (share of simulated
      decisions that clinicians take at least 1% of the time).
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
                "supported": found.supported,
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
      policies: built-in names or NAME=FOLDER; the clinician, who made the records, needs no
        estimate and gets none.
      out: folder to write the evaluation to.
      seed: of the evaluation.
    """
    options = OPEOptions(estimators=",".join(ESTIMATORS), seed=seed)
    others = [name for name in policies if name != CLINICIAN]
    found = evaluate_policies(records, out, others, options=options).table
    for estimator in ESTIMATORS:
        rows = found[found["estimator"] == estimator].set_index("policy")
        for column in ("estimate", "low", "high", "trust"):
            table[f"{estimator}_{column}"] = table["policy"].map(rows[column])
    return table


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Spearman correlation; None where it is not defined."""
    if len(one) < 3 or not np.ptp(one) > 0 or not np.ptp(other) > 0:
        return None
    return float(spearmanr(one, other).statistic)


def truth_metrics(table: pd.DataFrame) -> dict[str, object]:
    """Largest error, rank, and whether the order is right but for ties within the error."""
    true, simulated = table["true"].to_numpy(), table["simulated"].to_numpy()
    error = (table["true_high"] - table["true_low"]).to_numpy() / (2 * 1.96)
    difference = true[:, None] - true
    tied = np.abs(difference) < _TIE * np.hypot(error[:, None], error)
    agree = np.sign(difference) == np.sign(simulated[:, None] - simulated)
    return {
        "policies": len(table),
        "largest_error": float(np.abs(true - simulated).max()),
        "spearman": rank_correlation(true, simulated),
        "right_order": bool((agree | tied).all()),
    }
