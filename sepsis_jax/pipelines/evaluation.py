"""The tables of the paper, and a report: world model, policies, and stages of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from policy.agent.dialogue import COMPLETED
from policy.agent.records import RECORDS_FILE, Record, last_attempts
from policy.base import Policy
from policy.registry import CLINICIAN
from sepsis_jax.ope.diagnostics import Limits
from sepsis_jax.ope.intervals import ends, mean_of
from sepsis_jax.pipelines.episodes import SOURCE, of_split, taken
from sepsis_jax.pipelines.example_futures import ExampleFutures, example_futures
from sepsis_jax.pipelines.llm.evaluation import FAILED_RETURN
from sepsis_jax.pipelines.ope import evaluate_policies
from sepsis_jax.pipelines.ope_estimates import OPEOptions
from sepsis_jax.pipelines.policy_rates import HEADLINE_RATES, group_table, rule_counts
from sepsis_jax.pipelines.policy_values import TrueWorld, rank_correlation, recorded_returns
from sepsis_jax.pipelines.verdicts import read_checks
from sepsis_jax.pipelines.world_model_table import calibration_table, world_model_table
from sepsis_jax.report.evaluation import Findings, write_report
from sepsis_jax.report.policies import action_shares
from sepsis_jax.runs import MANIFEST, JsonDict, Progress, provenance, silent
from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.episode_files import (
    EPISODES_FILE,
    load_dose_edges,
    load_episodes_for,
    load_manifest,
)
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, check_replaceable, digest_file
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.evaluation import predict_split

MARKER = "tables.json"
EXAMPLE_SAMPLES = 300  # futures per plan of a single patient
ESTIMATORS = ("dr", "wis", "wpdis", "wpdis_alive", "world_model")
_OF_RECORDS = ("dr", "wis", "wpdis")  # equal to the mean return for who made the records
OF_STAGES = ("mortality_auroc", "mortality_auprc", "vasopressor_auroc", "vasopressor_auprc")
_ROW_OF_RECORDS = "on_policy"


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of the tables.

    Attributes:
      split: of the recorded stays that are evaluated.
      samples: simulated futures per stay and member of the world model.
      patients: fresh synthetic patients for true values; at least 2.
      seed: of noise, resamples and fresh patients; no seed that made the records.
      ope: of the off-policy estimates; its split and seed are those above.
    """

    split: str = "test"
    samples: int = 16
    patients: int = 1000
    seed: int = 2_000_000
    ope: OPEOptions = field(default_factory=OPEOptions)

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda count: count >= 1, "samples")
        require(self, "at least 2", lambda count: count >= 2, "patients")


class Tables(NamedTuple):
    """The tables; None where nothing was given for one.

    `policies.attrs` has the rank correlation with the truth, by estimator.
    """

    world_model: pd.DataFrame | None
    policies: pd.DataFrame
    stages: pd.DataFrame | None


def evaluate_all(
    episodes_path: str | Path,
    out: str | Path,
    policies: Sequence[str],
    *,
    model: str | Path | None = None,
    behavior: str = "recorded",
    treated: Sequence[str] = (),
    stages: str | Path | None = None,
    audit: str | Path | None = None,
    published: bool = False,
    options: EvaluationOptions | None = None,
    progress: Progress = silent,
) -> Tables:
    """Evaluates a world model, policies and stages of training, and writes all tables.

    Args:
      episodes_path: folder of recorded stays.
      out: folder to write: report.html, every table in it as .csv and .tex, tables.json, its
        figures, manifest.json, and `ope`, the whole off-policy evaluation.
      policies: as for `sepsis_jax.pipelines.ope.evaluate_policies`; names may have blanks. The
        clinician is always there.
      model: world model, for the first table, and in which policies that can be run are valued.
      behavior: as for `evaluate_policies`.
      treated: NAME=FOLDER of an agent's run over synthetic patients, for its true value.
      stages: folder of `policy stages`, for the last table; policies named like its stages
        (`start`, `sft`, `bc`, `rl`) are its rows, and of synthetic episodes have its true values.
      audit: folder of `sepsis-jax audit`, whose verdicts are shown; those of the episodes alone
        if not given.
      published: set the figures of the paper beside ours.
      options: settings.
      progress: called with (phase, share done).

    Raises:
      InputError: as `evaluate_policies`, or a run that does not fit.
    """
    options = options or EvaluationOptions()
    out, episodes_path = Path(out), Path(episodes_path)
    check_replaceable(out, MARKER)
    manifest = load_manifest(episodes_path)
    world_model = None if model is None else load_world_model(model)
    episodes = load_episodes_for(world_model, episodes_path)
    chosen, _ = of_split(episodes, options.split)
    runs = {name: Path(folder) for name, folder in map(_named, treated)}
    audited = None if audit is None else read_checks(audit)
    truths = {name: _true_of_run(folder) for name, folder in runs.items()}
    others = [text for text in policies if text != CLINICIAN]
    fitted = behavior != _RECORDED
    step_hours = float(manifest.get("step_hours", schema.STEP_HOURS))
    with atomic_folder(out, marker=MARKER) as folder:
        progress("off-policy evaluation", 0.05)
        ope = OPEOptions(**{**vars(options.ope), "split": options.split, "seed": options.seed})
        named = [*([CLINICIAN] if fitted else []), *others]
        found = evaluate_policies(
            episodes_path, folder / "ope", named, behavior=behavior, model=model, options=ope
        )
        progress("rules", 0.5)
        given = {name: np.asarray(p) for name, p in found.probs.items() if name != CLINICIAN}
        given = {CLINICIAN: taken(chosen)} | given
        counts = {
            name: rule_counts(
                chosen, table, step_hours=step_hours, dose_edges=load_dose_edges(episodes_path)
            )
            for name, table in given.items()
        }
        if manifest.get("source") == SOURCE:
            progress("true values", 0.6)
            truths |= _true_values(found.runnable, manifest, options)
            if stages is not None:
                truths = _true_of_stages(Path(stages)) | truths
        rates = {name: of.rates() for name, of in counts.items()}
        table = policy_table(found.table, rates, truths)
        of_model = bins = None
        examples: list[ExampleFutures] = []
        if world_model is not None:
            progress("world model", 0.75)
            predicted = predict_split(world_model, episodes, split=options.split)
            of_model = world_model_table(
                world_model, episodes, predicted, split=options.split, samples=options.samples,
                seed=options.seed,
            )  # fmt: skip
            bins = calibration_table(predicted)
            progress("futures of single patients", 0.9)
            examples = example_futures(
                world_model, chosen, manifest, samples=EXAMPLE_SAMPLES, seed=options.seed
            )
        of_stages = None if stages is None else stage_table(Path(stages), table)
        progress("writing", 0.95)
        tables = Tables(of_model, table, of_stages)
        facts = provenance(
            episodes={"path": str(episodes_path),
                      "sha256": digest_file(episodes_path / EPISODES_FILE)},
            policies=list(policies), model=None if model is None else _identity(Path(model)),
            behavior=behavior, treated=list(treated),
            stages=None if stages is None else str(stages),
            audit=None if audit is None else str(audit), cohort=manifest.get("command"),
            stays=chosen.num_stays, **{**vars(options), "ope": vars(ope)},
        )  # fmt: skip
        valid = np.asarray(chosen.valid)
        write_report(
            folder,
            Findings(
                episodes=episodes, manifest=manifest, split=options.split, policies=table,
                ess_by_step=found.table.attrs["ess_step"],
                needed=max(ope.effective, Limits.effective_share * chosen.num_stays),
                shares={name: action_shares(p, valid) for name, p in given.items()},
                groups=group_table(chosen, recorded_returns(chosen), found.groups, counts),
                checks=found.checks if audited is None else audited,
                facts=facts, world_model=of_model, calibration=bins, stages=of_stages,
                futures=examples, dialogues=_dialogues([*map(_agent_run, others), *runs.items()]),
                published=published,
            ),
        )  # fmt: skip
    progress("done", 1.0)
    return tables


_RECORDED = "recorded"


def policy_table(
    estimates: pd.DataFrame,
    rates: Mapping[str, Mapping[str, tuple[float, float, float]]],
    truths: Mapping[str, tuple[float, float, float]],
) -> pd.DataFrame:
    """One row per policy: estimates, rates of rules, and what is true.

    Args:
      estimates: of `sepsis_jax.ope.evaluate`.
      rates: by policy, percent as (estimate, low, high).
      truths: by policy, true value as (value, low, high); empty where nothing is known.

    Returns:
      Columns policy; dr, wis, wpdis, wpdis_alive, world_model (value in a world model, if there is
      one), each with _low and _high; less_clinician (of WIS, paired) with _low and _high; ess,
      trust, reason; adherence, unsafe, underdosing, overdosing with _low and _high; true with _low
      and _high. Records are their own estimate: a clinician who made them needs no weights.
    """
    rows: list[JsonDict] = []
    for name in rates:
        row: JsonDict = {"policy": name}
        own = estimates[estimates["policy"] == name].set_index("estimator")
        by_record = name == CLINICIAN and own.empty
        if by_record:
            own = estimates.set_index("estimator").loc[[_ROW_OF_RECORDS]].iloc[:1]
        for estimator in ESTIMATORS:
            source = _ROW_OF_RECORDS if by_record and estimator in _OF_RECORDS else estimator
            row |= _with_interval(estimator, own, source)
        headline = own.loc["wis"] if "wis" in own.index else None
        if headline is not None:
            row |= {
                "less_clinician": headline["difference"],
                "less_clinician_low": headline["difference_low"],
                "less_clinician_high": headline["difference_high"],
            }
            row |= {key: headline[key] for key in ("ess", "trust", "reason")}
        elif by_record:
            row |= {"trust": True, "reason": "the records are its own"}
        for rate in HEADLINE_RATES:
            row |= dict(zip(ends(rate), rates[name][rate], strict=True))
        if name in truths:
            row |= dict(zip(ends("true"), truths[name], strict=True))
        rows.append(row)
    table = pd.DataFrame(rows)
    if "true" in table:
        known = table["true"].notna()
        table.attrs["rank_correlation"] = {
            name: rank_correlation(
                table.loc[known, name].to_numpy(), table.loc[known, "true"].to_numpy()
            )
            for name in (*_OF_RECORDS, "world_model")
        }
    return table


def stage_table(stages: Path, policies: pd.DataFrame) -> pd.DataFrame:
    """One row per stage of training: off-policy estimates, rules, and predictions.

    Args:
      stages: folder of `policy stages`.
      policies: of `policy_table`; stages that are not among its policies have no estimates.
    """
    of_policies = policies.set_index("policy")
    estimates = ("dr", "wis", "wpdis", "wpdis_alive", "adherence", "unsafe")
    rows = []
    for _, stage in _evaluated_stages(stages).iterrows():
        row: JsonDict = {"stage": stage["stage"]}
        for name in estimates:
            for column in ends(name):
                known = stage["stage"] in of_policies.index
                row[column] = of_policies.loc[stage["stage"], column] if known else np.nan
        for name in OF_STAGES:
            for column in ends(name):
                row[column] = stage.get(column, np.nan)
        row |= dict(zip(ends("true"), (stage["value"], stage["low"], stage["high"]), strict=True))
        row |= {"valid": stage["valid"], "treated_adherence": stage["adherence"]}
        rows.append(row)
    return pd.DataFrame(rows)


def _evaluated_stages(stages: Path) -> pd.DataFrame:
    file = stages / "stages.csv"
    if not file.exists():
        raise InputError(f"{stages}: holds no stages.csv; name a folder of `policy stages`")
    found = pd.read_csv(file)
    return found[found["completed"].notna()]  # what else is in the file are comparators


def _with_interval(name: str, own: pd.DataFrame, estimator: str) -> dict[str, float]:
    columns = ends(name)
    if estimator not in own.index:
        return dict.fromkeys(columns, np.nan)
    found = own.loc[estimator]
    return dict(zip(columns, (found["estimate"], found["low"], found["high"]), strict=True))


def _named(text: str) -> tuple[str, str]:
    name, sign, folder = text.partition("=")
    if not (name and sign and folder):
        raise InputError(f"treated {text!r}: expected NAME=FOLDER of an agent's run")
    return name, folder


def _agent_run(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    return name, Path(file)


def _dialogues(given: Sequence[tuple[str, Path]]) -> dict[str, list[Record]]:
    """Records of the policies that are runs of agents, where any stay was completed."""
    found = {
        name: list(last_attempts(folder / RECORDS_FILE).values())
        for name, folder in given
        if (folder / RECORDS_FILE).is_file()
    }
    return {
        name: records
        for name, records in found.items()
        if any(record["status"] == COMPLETED for record in records)
    }


def _identity(model: Path) -> JsonDict:
    """A world model's folder, and the hash of the manifest that says what it was trained on."""
    manifest = model / MANIFEST
    return {
        "path": str(model),
        "manifest_sha256": digest_file(manifest) if manifest.is_file() else None,
    }


def _true_of_stages(stages: Path) -> dict[str, tuple[float, float, float]]:
    """True value of each stage's model, by its stays with fresh synthetic patients."""
    found = _evaluated_stages(stages)
    values = found[["value", "low", "high"]].itertuples(index=False, name=None)
    return dict(zip(found["stage"], values, strict=True))


def _true_of_run(folder: Path) -> tuple[float, float, float]:
    """True value of an agent by its run over synthetic patients; failed stays count as deaths."""
    file = folder / RECORDS_FILE
    if not file.exists():
        raise InputError(f"{folder}: holds no {RECORDS_FILE}; name a folder of `agent run`")
    totals = [
        record["total_reward"] if record["status"] == COMPLETED else FAILED_RETURN
        for record in last_attempts(file).values()
    ]
    if len(totals) < 2:
        raise InputError(f"{folder}: has fewer than two stays")
    found = mean_of(np.array(totals, np.float64))
    return found.value, found.low, found.high


def _true_values(
    runnable: Mapping[str, Policy], manifest: JsonDict, options: EvaluationOptions
) -> dict[str, tuple[float, float, float]]:
    """Of policies that can be run, in the synthetic world that made the records."""
    made = manifest.get("options", {})
    if made.get("seed") == options.seed:
        raise InputError(f"seed: {options.seed} made the records too; choose another")
    world = TrueWorld(options.patients, options.seed, float(made.get("confounding", 0.0)))
    everyone: dict[str, Policy | None] = {CLINICIAN: None, **runnable}
    found = {}
    for name, policy in everyone.items():
        value = mean_of(world.outcome(policy).total)
        found[name] = (value.value, value.low, value.high)
    return found
