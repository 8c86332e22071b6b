"""Audit of episodes and of a world model: checks, tables and a report in a folder.

A world model is checked by simulation. Patients of a split are simulated from a recorded row on,
under their clinician, and what was recorded should look like one of the simulated futures: values
within the intervals, as many deaths, as long stays. A recurrent model knows the clinician and lets
them choose; one that reads windows is given the recorded treatments, which also tell how the
patient really fared, so that its futures can be off by that alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd

from sepsis_jax.ope.robustness import SMALLEST, groups_at
from sepsis_jax.pipelines.episodes import of_split
from sepsis_jax.pipelines.leakage import audit_episodes
from sepsis_jax.pipelines.verdicts import (
    Check,
    above,
    check_rows,
    compare_means,
    none_found,
    not_run,
    rank_among,
    section,
    within,
)
from sepsis_jax.report.html import write_page
from sepsis_jax.runs import Progress, provenance, silent
from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.episode_files import (
    EPISODES_FILE,
    load_dose_edges,
    load_episodes_for,
    load_manifest,
)
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, check_replaceable, digest_file, write_json
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.evaluation import predict_mortality
from worldmodel.models.windows import measured_entries, to_sequences
from worldmodel.models.world_model import WorldModel
from worldmodel.resources import in_blocks
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import CHART_FEATURES, require_rollouts, rollout
from worldmodel.simulate.stays import FOLLOW_CLINICIAN

MARKER = "audit.csv"
STEPS = (1, 3, 6, 12)  # at which futures are compared with the record
COVERAGE = (0.85, 0.95)  # allowed, of intervals of 90%
VALUES = (*CHART_FEATURES, "sofa")
_LEVELS = np.arange(schema.NUM_LEVELS)
_BLOCK = 128  # patients per call
_SURE = 2.0  # standard errors


@dataclass(frozen=True)
class AuditConfig:
    """How a model is checked.

    Attributes:
      split: whose stays are simulated.
      step: row from which they are.
      samples: simulated futures per patient and ensemble member.
      stays: most stays; a random choice of more.
      seed: of choices and noise.
    """

    split: str = "test"
    step: int = 2
    samples: int = 16
    stays: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "0 or more", lambda row: row >= 0, "step")
        require(self, "at least 1", lambda count: count >= 1, "samples", "stays")
        splits = (*schema.SPLITS, "all")
        require(self, f"one of {', '.join(splits)}", splits.__contains__, "split")


class Simulated(NamedTuple):
    """Futures of P patients under the clinician, S samples each, H steps."""

    values: dict[str, np.ndarray]  # [P, S, H] by name
    alive: np.ndarray | None  # [P, S, H] probability that the stay goes on; None if not known
    mortality: np.ndarray  # [P] probability of death within 90 days


class Recorded(NamedTuple):
    """What was recorded of them; step h is h + 1 steps after the start."""

    values: dict[str, np.ndarray]  # [P, H] by name
    known: dict[str, np.ndarray]  # [P, H] bool: there is a value to compare with
    steps: np.ndarray  # [P] steps that the stay went on
    died: np.ndarray  # [P] bool
    groups: dict[str, np.ndarray]  # [P] masks by name


def run_audit(
    episodes_path: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    config: AuditConfig | None = None,
    progress: Progress = silent,
) -> list[Check]:
    """Audits a folder of episodes and, where one is given, a world model.

    Args:
      episodes_path: folder of episodes.
      out: folder to write: audit.csv and .json, columns.csv (what each value tells of each
        treatment), of a model coverage.csv, outcomes.csv and doses.csv, report.html, manifest.json.
      model: folder of a world model.
      config: how the model is checked; its seed is that of the episodes' checks as well.
      progress: called with (phase, share done).

    Raises:
      InputError: no stay of the split reaches the row, or bad files.
    """
    config = config or AuditConfig()
    check_replaceable(Path(out), MARKER)
    progress("reading", 0.0)
    world_model = None if model is None else load_world_model(model)
    episodes = load_episodes_for(world_model, episodes_path, shared_patients=True)
    progress("leakage", 0.1)
    checks, columns = audit_episodes(
        episodes,
        dose_edges=load_dose_edges(episodes_path),
        step_hours=load_manifest(episodes_path).get("step_hours", schema.STEP_HOURS),
        seed=config.seed,
    )
    tables = {"columns": columns}
    if world_model is not None:
        progress("futures of the model", 0.3)
        of_model, more = audit_model(world_model, of_split(episodes, config.split)[0], config)
        checks, tables = checks + of_model, tables | more
    progress("writing", 0.95)
    manifest = provenance(
        episodes={"path": str(episodes_path),
                  "sha256": digest_file(Path(episodes_path) / EPISODES_FILE)},
        model=None if model is None else str(model), config=asdict(config),
    )  # fmt: skip
    with atomic_folder(Path(out), marker=MARKER) as folder:
        pd.DataFrame(check_rows(checks)).to_csv(folder / MARKER, index=False)
        for name, table in tables.items():
            table.to_csv(folder / f"{name}.csv", index=False)
        write_json(folder / "audit.json", {"checks": check_rows(checks)})
        write_json(folder / "manifest.json", manifest)
        write_page(folder / "report.html", "Audit", [section(checks)])
    progress("done", 1.0)
    return checks


def audit_model(
    world_model: WorldModel, episodes: Episodes, config: AuditConfig
) -> tuple[list[Check], dict[str, pd.DataFrame]]:
    """All checks of a world model on the stays of one split, and the tables behind them.

    Raises:
      InputError: no stay reaches the row.
    """
    random = np.random.default_rng(config.seed)
    episodes = usable_stays(world_model, episodes, config, random)
    recorded = recorded_futures(episodes, config.step, all_entries=world_model.is_recurrent)
    simulated = simulate_clinician(world_model, episodes, config)
    coverage = coverage_table(simulated, recorded, random)
    outcomes = outcome_table(simulated, recorded)
    rises = dose_responses(world_model, episodes, config)
    doses = dose_table(rises, recorded.groups)
    checks = [*check_coverage(coverage), *check_outcomes(outcomes), *check_doses(doses)]
    return checks, {"coverage": coverage, "outcomes": outcomes, "doses": doses}


def usable_stays(
    world_model: WorldModel, episodes: Episodes, config: AuditConfig, random: np.random.Generator
) -> Episodes:
    """At most `config.stays` of the stays that reach the row, if they fit in memory.

    Raises:
      InputError: no stay reaches the row, or memory is short.
    """
    usable = np.flatnonzero(np.asarray(episodes.length) > config.step)
    if not len(usable):
        raise InputError(f"step: no stay of the split reaches row {config.step}")
    require_rollouts(
        config.samples * world_model.num_members,
        patients=min(_BLOCK, len(usable), config.stays),
        plans=1,
        horizon=max(STEPS),
        features=len(CHART_FEATURES),
    )
    if len(usable) > config.stays:
        usable = np.sort(random.choice(usable, config.stays, replace=False))
    return episodes.select(usable)


def recorded_futures(episodes: Episodes, step: int, *, all_entries: bool) -> Recorded:
    """What was recorded of P stays after the row `step`.

    Args:
      episodes: the stays, which reach it.
      step: the row.
      all_entries: compare values that were held or filled, too, as a recurrent model makes them.
    """
    rows = step + 1 + np.arange(max(STEPS))
    length = np.asarray(episodes.length)
    there = rows < length[:, None]
    rows = np.minimum(rows, episodes.num_steps - 1)
    dynamic = np.asarray(episodes.dynamic)[:, rows]
    measured = np.asarray(measured_entries(episodes))[:, rows]
    values, known = {}, {}
    for name in CHART_FEATURES:
        column = schema.INDEX[name]
        values[name] = dynamic[..., column]
        known[name] = there & (measured[..., column] | all_entries)
    values["sofa"], known["sofa"] = np.asarray(episodes.sofa)[:, rows], there
    return Recorded(
        values, known, length - 1 - step, np.asarray(episodes.died_90d), groups_at(episodes, step)
    )


def simulate_clinician(
    world_model: WorldModel, episodes: Episodes, config: AuditConfig
) -> Simulated:
    """Futures of P stays from the row on."""
    horizon = max(STEPS)
    samples = config.samples * world_model.num_members
    rows = np.minimum(config.step + np.arange(horizon), np.asarray(episodes.length)[:, None] - 1)
    plans = np.take_along_axis(np.asarray(episodes.action), rows, 1)[:, None]
    if world_model.is_recurrent:
        plans = np.full_like(plans, FOLLOW_CLINICIAN)
    key = jax.random.key(config.seed)

    def of_patients(chosen: np.ndarray) -> tuple[np.ndarray, ...]:
        start = start_history(world_model, episodes.select(chosen), config.step)
        found = rollout(world_model, key, start, plans[chosen], samples=samples)
        alive = np.ones(found.sofa.shape) if found.alive is None else np.asarray(found.alive)
        values = [np.asarray(found.feature(name))[:, 0] for name in CHART_FEATURES]
        return (np.asarray(found.mortality)[:, 0].mean(-1), alive[:, 0],
                np.asarray(found.sofa)[:, 0], *values)  # fmt: skip

    count = episodes.num_stays
    mortality, alive, score, *values = in_blocks(of_patients, count, min(_BLOCK, count))
    if not world_model.is_recurrent:  # the recorded treatments end with the stay
        start_rows = np.stack([np.arange(count), np.full(count, config.step)], axis=1)
        sequences = to_sequences(episodes, world_model.scaler)
        mortality = predict_mortality(world_model, sequences, start_rows.astype(np.int32))
    named = dict(zip(VALUES, (*values, score), strict=True))
    return Simulated(named, alive if world_model.is_recurrent else None, mortality)


# Values


def coverage_table(
    simulated: Simulated, recorded: Recorded, random: np.random.Generator
) -> pd.DataFrame:
    """Share of recorded values within the central 90% of the simulated ones.

    Ties, as of values that are held, are broken at random, so that a true model covers 90% of
    discrete values as well.

    Returns:
      Columns value, steps, stays, coverage, error (its standard error).
    """
    lines = []
    for name in VALUES:
        for steps in STEPS:
            use = recorded.known[name][:, steps - 1]
            count = int(use.sum())
            share = np.nan
            if count:
                drawn = simulated.values[name][use, :, steps - 1]
                weight = np.ones(drawn.shape)
                if simulated.alive is not None:
                    weight = simulated.alive[use, :, steps - 1]
                value = recorded.values[name][use, steps - 1]
                rank = rank_among(value, drawn, weight, random)
                share = float(((rank > 0.05) & (rank < 0.95)).mean())
            error = np.sqrt(max(share * (1 - share), 0.01) / max(count, 1))
            lines.append((name, steps, count, share, error))
    return pd.DataFrame(lines, columns=["value", "steps", "stays", "coverage", "error"])


def check_coverage(table: pd.DataFrame) -> list[Check]:
    """One check per value: the horizon whose coverage is furthest from 90%."""
    checks = []
    for name, rows in table.groupby("value", sort=False):
        title = f"90% intervals of {name}"
        rows = rows[rows["stays"] >= SMALLEST]
        if rows.empty:
            checks.append(not_run(title, f"Fewer than {SMALLEST} stays."))
            continue
        worst = rows.loc[(rows["coverage"] - sum(COVERAGE) / 2).abs().idxmax()]
        listed = ", ".join(f"{row.coverage:.2f} after {row.steps}" for row in rows.itertuples())
        text = f"Coverage under the clinician by steps: {listed}."
        error = _SURE * float(worst["error"])
        checks.append(within(title, float(worst["coverage"]), error, COVERAGE, text))
    return checks


# Outcomes


def outcome_table(simulated: Simulated, recorded: Recorded) -> pd.DataFrame:
    """Mortality and length of stay, predicted and observed, by group of patients.

    Returns:
      Column outcome, and those of `compare_means`.
    """
    groups = {name: mask for name, mask in recorded.groups.items() if mask.sum() >= SMALLEST}
    everyone = {name: mask for name, mask in groups.items() if mask.all()}
    chance = simulated.mortality
    found = {
        "mortality": compare_means(
            recorded.died.astype(np.float64),
            chance,
            chance * (1 - chance),
            groups,
            intervals=len(groups),
        )
    }
    if simulated.alive is not None:
        going_on = simulated.alive.mean(1).astype(np.float64)  # [P, H]
        steps = np.arange(1, going_on.shape[1] + 1)
        mean = going_on.sum(1)
        square = ((2 * steps - 1) * going_on).sum(1)  # E[L^2] = sum of (2 h - 1) P(L >= h)
        stayed = np.minimum(recorded.steps, steps[-1]).astype(np.float64)
        both = len(groups) + len(STEPS)
        found["steps"] = compare_means(stayed, mean, square - mean**2, groups, intervals=both)
        for h in STEPS:
            chance, there = going_on[:, h - 1], (recorded.steps >= h).astype(np.float64)
            variance = chance * (1 - chance)
            found[f"share still there after {h} steps"] = compare_means(
                there, chance, variance, everyone, intervals=both
            )
    table = pd.concat(found, names=["outcome"]).reset_index(level=0)
    return table.reset_index(drop=True)


def check_outcomes(table: pd.DataFrame) -> list[Check]:
    """Mortality by group, and length of stay where the model has one."""
    checks = []
    for title, mine in (
        ("mortality by group", table["outcome"] == "mortality"),
        ("length of stay", table["outcome"] != "mortality"),
    ):
        rows = table[mine]
        if rows.empty:
            checks.append(not_run(title, "Too few stays, or the model's stays do not end."))
            continue
        outside = rows[~rows["inside"]]
        gap = (rows["observed"] - rows["predicted"]).abs()
        worst = rows.loc[(gap / (rows["high"] - rows["low"]).clip(lower=1e-9)).idxmax()]
        text = (
            f"{len(outside)} of {len(rows)} observed means are outside the model's interval; "
            f"furthest: {worst['outcome']} of {worst['group']}, observed {worst['observed']:.3g}, "
            f"predicted {worst['predicted']:.3g} ({worst['low']:.3g} to {worst['high']:.3g})."
        )
        checks.append(none_found(title, len(outside), text))
    return checks


# Treatments


def dose_responses(world_model: WorldModel, episodes: Episodes, config: AuditConfig) -> np.ndarray:
    """[P, 5] mean MAP, mmHg, one step after each vasopressor level, with the recorded fluid."""
    fluid = np.asarray(episodes.fluid)[:, config.step]
    plans = schema.action_index(_LEVELS[None, :, None], fluid[:, None, None])
    key = jax.random.key(config.seed)
    samples = config.samples * world_model.num_members

    def of_patients(chosen: np.ndarray) -> np.ndarray:
        start = start_history(world_model, episodes.select(chosen), config.step)
        found = rollout(world_model, key, start, plans[chosen], samples=samples,
                        features=("meanbp",), mortality=False)  # fmt: skip
        mean: np.ndarray = np.asarray(found.feature("meanbp"), np.float64)[..., 0].mean(-1)
        return mean

    count = episodes.num_stays
    result: np.ndarray = in_blocks(of_patients, count, min(_BLOCK, count))
    return result


def dose_table(pressure: np.ndarray, groups: dict[str, np.ndarray]) -> pd.DataFrame:
    """Mean MAP by level, and its rise from the level below, of all patients and of those in shock.

    Returns:
      Columns group, stays, level, meanbp, rise, error (standard error of the rise).
    """
    tables = []
    for name in ("all", "shock"):
        of = pressure[groups[name]]
        if len(of) < 2:
            continue
        rise = np.diff(of, axis=1, prepend=np.nan)
        error = rise.std(0, ddof=1) / np.sqrt(len(of))
        columns = {"group": name, "stays": len(of), "level": _LEVELS, "meanbp": of.mean(0)}
        tables.append(pd.DataFrame(columns | {"rise": rise.mean(0), "error": error}))
    return pd.concat(tables, ignore_index=True)


def check_doses(table: pd.DataFrame) -> list[Check]:
    """MAP should rise from each vasopressor level to the next."""
    checks = []
    for group in ("all", "shock"):
        title = f"MAP by vasopressor level, {group}"
        rows = table[table["group"] == group]
        if rows.empty:
            checks.append(not_run(title, "Fewer than two patients."))
            continue
        least = rows.loc[rows["rise"].idxmin()]
        fall = -float(least["rise"])
        listed = ", ".join(f"{value:.1f}" for value in rows["meanbp"])
        text = f"Mean MAP one step after levels 0 to 4: {listed} mmHg; value: the largest fall."
        bound = fall - _SURE * float(least["error"])
        checks.append(above(title, fall, bound, text, suspect=0.0, fail=0.0))
    return checks
