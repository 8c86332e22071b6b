"""The demo: cohort, world model, futures and report in one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from sepsis_jax.pipelines import world_model
from sepsis_jax.pipelines.episodes import make_synthetic_cohort
from sepsis_jax.pipelines.futures import FuturesConfig, compare_futures, mortality_rows
from sepsis_jax.pipelines.leakage import audit_episodes
from sepsis_jax.pipelines.verdicts import check_rows, section, summary_line
from sepsis_jax.pipelines.world_model import FEATURES, OUTCOME_TITLES, simulate_patient
from sepsis_jax.report.figures import training_figure
from sepsis_jax.report.html import (
    OUTCOME_COLUMNS,
    STATE_COLUMNS,
    Section,
    Table,
    outcome_rows,
    state_rows,
    write_page,
)
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.episode_files import load_dose_edges, load_episodes
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import check_replaceable, write_json
from worldmodel.models.training import EpochProgress, TrainConfig
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import require_rollouts, rollout

COHORT = "cohort"  # the folder that marks a demo
HORIZON = 6
START_STEP = 2
FRESH_PATIENTS = 600  # of the comparison with the truth
HYPOTENSION = 58.0  # mmHg: in need of treatment, and treatable
PLANS = ("clinician", "nothing=0,0", "fluids=0,3", "vasopressor=2,1", "both=2,3;2,1")
Phase = Callable[[str], None]


def run_demo(
    out: str | Path,
    *,
    data: str | Path | None = None,
    patients: int = 4000,
    samples: int = 2000,
    config: TrainConfig | None = None,
    seed: int = 0,
    say: Phase = print,
    training_progress: EpochProgress | None = None,
) -> JsonDict:
    """Runs everything and writes `out/report.html` beside the parts.

    Args:
      out: folder for cohort/, model/, simulation/, (synthetic only) effects/, report.html and
        summary.json.
      data: MIMIC-IV; None for the synthetic world.
      patients: synthetic patients.
      samples: futures per plan, rounded up to a multiple of the ensemble size.
      config: of training; None for settings that fit the size of the cohort.
      seed: of every random choice.
      say: called with the name of each part as it begins.
      training_progress: called after each epoch.

    Returns:
      The figures of summary.json.
    """
    out = Path(out)
    check_replaceable(out, COHORT)
    require_rollouts(samples, patients=1, plans=len(PLANS), horizon=HORIZON, features=len(FEATURES))
    say("1/5 cohort")
    cohort_section = _make_cohort(out / COHORT, data, patients, seed)
    say("2/5 world model")
    episodes = load_episodes(out / COHORT)
    edges = load_dose_edges(out / COHORT)
    checks = audit_episodes(episodes, dose_edges=edges, seed=seed).checks
    trained = world_model.train(
        out / COHORT,
        out / "model",
        config or default_config(episodes.num_stays, seed),
        progress=training_progress,
    )
    training_figure(trained.history, out / "world_model.png")
    members = trained.world_model.num_members
    samples = -(-samples // members) * members
    say("3/5 futures of one patient")
    test = episodes.of_split("test")
    stay = hypotensive_stay(test, step=START_STEP, horizon=HORIZON)
    outcomes = simulate_patient(
        trained.world_model, test, out / "simulation",
        stay_id=stay, step=START_STEP, plans=PLANS, horizon=HORIZON, samples=samples, seed=seed,
    )  # fmt: skip
    say("4/5 speed")
    speed = rollout_speed(trained.world_model, test, stay)
    sections = [cohort_section, section(checks), _model_section(trained.metrics, out)]
    sections.append(_futures_section(outcomes, stay, samples, speed, out))
    summary: JsonDict = {
        "stays": episodes.num_stays,
        "audit": summary_line(checks),
        "checks": check_rows(checks),
        **world_model.summary(trained.metrics),
        "branch_steps_per_second": speed,
    }
    say("5/5 report")
    if data is None:
        asked = FuturesConfig(patients=FRESH_PATIENTS, seed=seed + 1000)
        summary["futures"] = compare_futures(out / "model", out / "effects", asked)
        summary["plans"] = mortality_rows(out / "effects")
        sections.append(_effects_section(summary["futures"], summary["plans"], out))
    write_page(out / "report.html", "sepsis-jax: a first look", sections)
    write_json(out / "summary.json", summary)
    return summary


def default_config(stays: int, seed: int) -> TrainConfig:
    """Settings for a demonstration: an ensemble, or gentler where there are few stays."""
    config = TrainConfig(seed=seed)
    if stays >= 1000:
        return replace(config, members=3)
    few = replace(config.stays, epochs=60, batch_size=16, learning_rate=1e-3, patience=8)
    return replace(config, stays=few)


def hypotensive_stay(episodes: Episodes, *, step: int, horizon: int) -> int:
    """The stay_id with a MAP nearest to `HYPOTENSION` at `step`, recorded to `step + horizon`."""
    length = np.asarray(episodes.length)
    usable = np.flatnonzero(length >= step + horizon)
    if not len(usable):
        raise InputError(
            f"no test stay is recorded for {step + horizon} steps; use a larger cohort"
        )
    meanbp = np.asarray(episodes.dynamic)[usable, step, schema.INDEX["meanbp"]]
    return int(np.asarray(episodes.stay_id)[usable[np.argmin(np.abs(meanbp - HYPOTENSION))]])


def rollout_speed(world_model: WorldModel, episodes: Episodes, stay: int) -> float:
    """Branch-steps per second, warm: one patient x 25 actions x 160 samples x 6 steps."""
    chosen = np.flatnonzero(np.asarray(episodes.stay_id) == stay)
    start = start_history(world_model, episodes.select(chosen), START_STEP)
    plans = np.tile(np.arange(schema.NUM_ACTIONS)[:, None], (1, HORIZON))
    samples = 160 * world_model.num_members
    seconds = []
    for repeat in range(4):
        begin = time.perf_counter()
        jax.block_until_ready(
            rollout(world_model, jax.random.key(repeat), start, plans, samples=samples)
        )
        seconds.append(time.perf_counter() - begin)
    return len(plans) * samples * HORIZON / float(np.median(seconds[1:]))


def _make_cohort(path: Path, data: str | Path | None, patients: int, seed: int) -> Section:
    if data is None:
        summary = make_synthetic_cohort(path, patients=patients, seed=seed)
        return Section(
            "Patients",
            ("Synthetic: a mechanistic sepsis patient, treated by a stochastic clinician with "
             "known action probabilities. No record of a person is involved.",),
            tables=(Table("Cohort", ("", "value"), list(summary.items())),),
        )  # fmt: skip
    from sepsis_jax.cohort import CohortOptions, build_cohort

    report = build_cohort(data, path, replace(CohortOptions(), seed=seed))
    rows = [(line["reason"], line["excluded"], line["remaining"]) for line in report.consort]
    return Section(
        "Patients",
        (f"Sepsis-3 stays of MIMIC-IV: {report.stays} stays, {report.rows} steps.",),
        tables=(Table("Who is in the cohort", ("step", "excluded", "remaining"), rows),),
    )


def _model_section(metrics: JsonDict, out: Path) -> Section:
    title = f"{metrics['split']} split: {metrics['stays']} stays, {metrics['transitions']} steps"
    return Section(
        "World model",
        ("Trained to predict the patient four hours ahead and death within 90 days. Errors are in "
         "standard deviations (z-scores), over values really measured in the next step.",),
        pictures=((out / "world_model.png", "Loss by epoch."),),
        tables=(
            Table(f"Next state, {title}", STATE_COLUMNS, state_rows(metrics)),
            Table("Death within 90 days", OUTCOME_COLUMNS, outcome_rows(metrics)),
        ),
    )  # fmt: skip


def _futures_section(
    outcomes: pd.DataFrame, stay: int, samples: int, speed: float, out: Path
) -> Section:
    columns = OUTCOME_TITLES[: outcomes.shape[1]]
    return Section(
        "Counterfactual futures of one patient",
        (f"Stay {stay} of the test split, in shock at step {START_STEP}. Every "
         f"plan meets the same {samples} noise samples. This machine simulates {speed:,.0f} "
         "branch-steps per second.",),
        pictures=((out / "simulation" / "fan_chart.png",
                   "Median, 50% and 90% of futures under each plan; black: what was recorded."),),
        tables=(Table("Outcomes by plan", columns, list(outcomes.itertuples(index=False))),),
    )  # fmt: skip


def _effects_section(metrics: JsonDict, plans: list[JsonDict], out: Path) -> Section:
    names = (
        "mortality",
        "mortality_shock",
        "reward",
        "lactate",
        "meanbp",
        "output_4hourly",
        "sofa",
    )
    scores = [(name, metrics[name]["spearman"], metrics[name]["error"]) for name in names]
    chosen = [
        (who.replace("_", " "), metrics[who]["reward"], metrics[who]["mortality"])
        for who in ("chosen_by_model", "clinician", "best_constant_plan")
    ]
    return Section(
        "Is it true?",
        (f"In the synthetic world the truth is known. {metrics['patients']} patients that the "
         "model has not seen get each of the 25 treatments for 24 hours, then the clinician goes "
         "on: what really happens, beside what the model said. Each dot is one treatment.",),
        pictures=((out / "effects" / "futures.png", "Learned against true effects at 24 hours."),),
        tables=(
            Table("Death within 90 days by treatment",
                  ("vasopressor", "fluid", "true", "learned", "support"),
                  [tuple(row.values()) for row in plans]),
            Table("Agreement over the 25 treatments", ("of", "Spearman", "mean error"), scores),
            Table("Giving, per patient, what the model rates best",
                  ("who chooses", "true reward", "true mortality"), chosen),
        ),
    )  # fmt: skip
