"""The demo: cohort, world model, futures and report in one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from policy import registry
from policy.registry import CLINICIAN
from sepsis_jax.pipelines import world_model
from sepsis_jax.pipelines.episodes import make_synthetic_cohort, taken
from sepsis_jax.pipelines.example_futures import (
    HORIZON,
    PLANS,
    START_STEP,
    chosen_stays,
    example_futures,
)
from sepsis_jax.pipelines.futures import MARKER, FuturesConfig, compare_futures, mortality_rows
from sepsis_jax.pipelines.leakage import audit_episodes
from sepsis_jax.pipelines.verdicts import check_rows, section, summary_line
from sepsis_jax.pipelines.world_model import FEATURES, simulate_patient
from sepsis_jax.pipelines.world_model_table import calibration_table
from sepsis_jax.report import words
from sepsis_jax.report.evaluation import FIGURES, actions_section, calibration_parts
from sepsis_jax.report.examples import futures_section, provenance_section
from sepsis_jax.report.html import (
    Section,
    Table,
    outcome_rows,
    state_rows,
    write_page,
)
from sepsis_jax.report.panels import effect_panels, training_panels
from sepsis_jax.report.patients import patient_sections
from sepsis_jax.report.policies import action_shares
from sepsis_jax.report.tables import write_tables
from sepsis_jax.runs import MANIFEST, JsonDict, provenance
from worldmodel import schema
from worldmodel.episode_files import (
    EPISODES_FILE,
    load_dose_edges,
    load_episodes,
    load_manifest,
)
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import check_replaceable, digest_file, write_json
from worldmodel.models.evaluation import predict_split
from worldmodel.models.training import EpochProgress, TrainConfig, Trained
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import require_rollouts, rollout

COHORT = "cohort"  # the folder that marks a demo
FRESH_PATIENTS = 600  # of the comparison with the truth
RULES = ("guideline", "titration")  # policies whose prescriptions are shown beside the clinician's
_LEAD = (
    "A world model of sepsis, trained on the patients below, plays out what becomes of a patient "
    "under treatments that were not given. This page shows who the patients are, how good the "
    "model is, what it says of single patients, and where the truth is known, whether that is so.",
)
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
      out: folder for cohort/, model/, simulation/, (synthetic only) effects/, report.html with
        its tables/ and figures/, and summary.json.
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
    _make_cohort(out / COHORT, data, patients, seed)
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
    samples = trained.world_model.whole_samples(samples)
    say("3/5 futures of three patients")
    test, manifest = episodes.of_split("test"), load_manifest(out / COHORT)
    chosen = chosen_stays(test)
    if not chosen:
        raise InputError(
            f"no test stay is recorded for {START_STEP + HORIZON} steps; use a larger cohort"
        )
    stay = int(np.asarray(test.stay_id)[next(iter(chosen))])
    simulate_patient(
        trained.world_model, test, out / "simulation",
        stay_id=stay, step=START_STEP, plans=PLANS, horizon=HORIZON, samples=samples, seed=seed,
    )  # fmt: skip
    examples = example_futures(trained.world_model, test, manifest, samples=samples, seed=seed)
    say("4/5 speed")
    speed = rollout_speed(trained.world_model, test, stay)
    summary: JsonDict = {
        "stays": episodes.num_stays,
        "audit": summary_line(checks),
        "checks": check_rows(checks),
        **world_model.summary(trained.metrics),
        "branch_steps_per_second": speed,
    }
    say("5/5 report")
    figures = out / FIGURES
    sections = [
        *patient_sections(episodes, manifest, split="test"),
        _model_section(trained, episodes, figures),
        futures_section(examples, figures),
    ]
    if data is None:
        asked = FuturesConfig(patients=FRESH_PATIENTS, seed=seed + 1000)
        summary["futures"] = compare_futures(out / "model", out / "effects", asked)
        summary["plans"] = mortality_rows(out / "effects")
        sections.append(_effects_section(summary["futures"], out / "effects", figures))
    facts = provenance(
        episodes={"path": str(out / COHORT), "sha256": digest_file(out / COHORT / EPISODES_FILE)},
        samples=samples, seed=seed, patients=patients if data is None else None,
    )  # fmt: skip
    write_json(out / MANIFEST, facts)
    facts["branch_steps_per_second"] = f"{speed:,.0f}"
    sections += [_actions_section(test, figures), section(checks), provenance_section(facts)]
    write_tables(out / "tables", sections)
    write_page(out / "report.html", "sepsis-jax: a first look", sections, _LEAD)
    write_json(out / "summary.json", summary)
    return summary


def default_config(stays: int, seed: int) -> TrainConfig:
    """Settings for a demonstration: an ensemble, or gentler where there are few stays."""
    config = TrainConfig(seed=seed)
    if stays >= 1000:
        return replace(config, members=3)
    few = replace(config.stays, epochs=60, batch_size=16, learning_rate=1e-3, patience=8)
    return replace(config, stays=few)


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


def _make_cohort(path: Path, data: str | Path | None, patients: int, seed: int) -> None:
    if data is None:
        make_synthetic_cohort(path, patients=patients, seed=seed)
        return
    from sepsis_jax.cohort import CohortOptions, build_cohort

    build_cohort(data, path, replace(CohortOptions(), seed=seed))


def _model_section(trained: Trained, episodes: Episodes, figures: Path) -> Section:
    metrics = trained.metrics
    title = f"{metrics['split']} split: {metrics['stays']} stays, {metrics['transitions']} steps"
    bins = calibration_table(predict_split(trained.world_model, episodes))
    pictures, tables = calibration_parts(bins, figures)
    return Section(
        "World model",
        ("Trained to predict the patient four hours ahead and death within 90 days. Errors "
         "(and CRPS, that of the whole distribution) are in standard deviations, over values "
         "really measured in the next step unless the column says that filled-in ones count "
         "too.",),
        (training_panels(trained.history, figures), *pictures),
        (
            Table(f"Next state, {title}",
                  ("model", "mean absolute error", "the same, filled-in values too",
                   "negative log likelihood", "CRPS", "in the 90% interval, share",
                   "ventilation, AUROC"), state_rows(metrics), "next_state"),
            Table("Death within 90 days",
                  ("model and rows", "AUROC", "AUPRC", "Brier score", "calibration error",
                   "died, share"), outcome_rows(metrics), "mortality"),
            *tables,
        ),
    )  # fmt: skip


def _actions_section(episodes: Episodes, figures: Path) -> Section:
    valid = np.asarray(episodes.valid)
    probs = {CLINICIAN: taken(episodes)}
    probs |= {name: np.asarray(registry.make(name).action_probs(episodes)) for name in RULES}
    shares = {name: action_shares(of, valid) for name, of in probs.items()}
    return actions_section(shares, figures)


_SCORES = ("mortality", "mortality_supported", "mortality_unsupported", "mortality_shock", "reward",
           "lactate", "meanbp", "output_4hourly", "sofa")  # fmt: skip


def _effects_section(metrics: JsonDict, folder: Path, figures: Path) -> Section:
    plans = mortality_rows(folder)
    rows = [
        (words.effect(name), *(None if x is None else f"{x:.3f}" for x in metrics[name].values()))
        for name in _SCORES
    ]
    chosen = [
        (
            words.effect(who),
            f"{metrics[who]['reward']:.2f}",
            f"{100 * metrics[who]['mortality']:.1f}",
        )
        for who in ("chosen_by_model", "clinician", "best_constant_plan")
    ]
    levels = [name.lower() for name in schema.LEVEL_NAMES]
    cells = {(row["vasopressor"], row["fluid"]): _true_and_learned(row) for row in plans}
    grid = [
        (level, *(cells[i, j] for j in range(schema.NUM_LEVELS))) for i, level in enumerate(levels)
    ]
    return Section(
        "Is it true?",
        (f"In the synthetic world the truth is known. {metrics['patients']} patients that the "
         f"model has not seen get each of the 25 treatments for {metrics['held_hours']:g} hours, "
         "then the clinician goes on: what really happens, beside what the model said.",),
        (effect_panels(pd.read_csv(folder / MARKER), figures),),
        (
            Table("Death within 90 days, %: true / predicted",
                  ("vasopressor", *(f"fluid {level}" for level in levels)), grid,
                  "mortality_by_treatment", pd.DataFrame(plans),
                  ("† clinicians hardly ever give this, so the model extrapolates.",)),
            Table("Agreement over the 25 treatments",
                  ("of what", "rank correlation (Spearman)", "mean absolute error"), rows,
                  "agreement", notes=("Errors of death are shares; others are in the unit of the "
                                      "figure above.",)),
            Table("Giving each patient what the model rates best: what truly comes of it",
                  ("who chooses", "true total reward", "true mortality, %"), chosen, "choice"),
        ),
    )  # fmt: skip


def _true_and_learned(row: JsonDict) -> str:
    mark = "" if row["supported"] else " †"
    return f"{100 * row['mortality_true']:.0f} / {100 * row['mortality_learned']:.0f}{mark}"
