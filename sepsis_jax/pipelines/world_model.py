"""World models of folders: training on episodes, and futures of one patient."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd

from policy.train.loop.metrics import check_wandb, log_courses
from sepsis_jax.report.figures import fan_chart
from sepsis_jax.runs import MANIFEST, JsonDict, provenance
from worldmodel import schema
from worldmodel.cards import CARD, world_model_card
from worldmodel.episode_files import (
    EPISODES_FILE,
    load_dose_edges,
    load_episodes,
    load_manifest,
    load_scaler,
)
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import (
    atomic_folder,
    check_replaceable,
    digest_file,
    read_json,
    write_json,
)
from worldmodel.models.checkpoint import (
    CONFIG,
    PARAMS,
    load_world_model,
    save_pretrained,
    save_world_model,
)
from worldmodel.models.training import EpochProgress, TrainConfig, Trained, train_world_model
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import start_history
from worldmodel.simulate.plans import Plan, is_clinician, parse_plan
from worldmodel.simulate.rollout import Rollouts, check_mode, require_rollouts, rollout
from worldmodel.simulate.statistics import MAP_TARGET, plan_support, spread, weights_of

HEADLINES = ("split", "stays", "transitions", "state", "outcome", "outcome_every_step")


def train(
    episodes_path: str | Path,
    out: str | Path,
    config: TrainConfig,
    *,
    progress: EpochProgress | None = None,
) -> Trained:
    """Trains on a folder of episodes and writes the world model beside its metrics.

    The state of an unfinished run is kept in `<out>.training`; the same call goes on from
    there. It is removed when the model is written.

    Args:
      episodes_path: folder of episodes.
      out: folder of the world model to write: parameters, scaler, manifest, metrics.json.
      config: what to train and how.
      progress: called after each epoch.
    """
    episodes_path, out = Path(episodes_path), Path(out)
    manifest = load_manifest(episodes_path)
    check_replaceable(out, PARAMS)  # before hours of training, not after
    check_wandb()
    state_folder = out.with_name(f"{out.name}.training")
    trained = train_world_model(
        load_episodes(episodes_path),
        load_scaler(episodes_path),
        config,
        step_hours=manifest["step_hours"],
        dose_edges=load_dose_edges(episodes_path),
        state_folder=state_folder,
        progress=progress,
    )
    save_world_model(
        trained.world_model,
        out,
        manifest=provenance(
            training=asdict(config),
            metrics=summary(trained.metrics),
            episodes={
                "source": manifest.get("source"),
                "stays": manifest.get("stays"),
                "sha256": digest_file(episodes_path / EPISODES_FILE),
            },
        ),
    )
    write_json(out / "metrics.json", {**trained.metrics, "history": trained.history})
    (out / CARD).write_text(world_model_card(read_json(out / MANIFEST)))
    log_courses(out, trained.history)
    shutil.rmtree(state_folder)
    return trained


def export_pretrained(model: str | Path, out: str | Path) -> None:
    """Writes a world model of any folder as the Hugging Face hub has them, with its figures.

    Args:
      model: folder to read, as `load_world_model`.
      out: folder to write.
    """
    facts: JsonDict = {}
    for name in (MANIFEST, CONFIG):
        if (Path(model) / name).is_file():
            facts |= read_json(Path(model) / name)
    kept: JsonDict = {n: facts[n] for n in ("training", "metrics", "episodes") if n in facts}
    save_pretrained(load_world_model(model), out, manifest=kept)


def summary(metrics: JsonDict) -> JsonDict:
    """The headline figures of a world model, without the per-feature table."""
    return {name: metrics[name] for name in HEADLINES}


MARKER = "trajectories.csv"
FEATURES = ("meanbp", "lactate", "output_4hourly")
OUTCOME_TITLES = (
    "plan", "mortality", "5%", "95%", "total reward", "MAP < 65", "ventilated", "projected",
    "support",
)  # fmt: skip


class PatientFutures(NamedTuple):
    """Futures of one recorded patient under K plans.

    Attributes:
      plans: in order.
      table: of `trajectory_table`.
      outcomes: of `outcome_table`.
      recorded: recorded rows around the start: hour and a column per value.
    """

    plans: list[Plan]
    table: pd.DataFrame
    outcomes: pd.DataFrame
    recorded: pd.DataFrame


def patient_futures(
    world_model: WorldModel,
    stay: Episodes,
    *,
    step: int,
    plans: Sequence[str],
    horizon: int,
    samples: int,
    seed: int,
    mode: str = "corrected",
) -> PatientFutures:
    """Simulates one stay; arguments as for `simulate_patient`.

    Raises:
      InputError: a malformed plan, or more futures than memory holds.
    """
    require_rollouts(samples, patients=1, plans=len(plans), horizon=horizon, features=len(FEATURES))
    parsed = [parse_plan(text, horizon=horizon, stay=stay, step=step) for text in plans]
    names = [plan.name for plan in parsed]
    if not names or len(set(names)) < len(names):
        raise InputError(f"plans: names must be given and differ, got {names}")
    rollouts = rollout(
        world_model,
        jax.random.key(seed),
        start_history(world_model, stay, step, recorded_sofa=mode == "reference"),
        np.stack([plan.actions for plan in parsed]),
        samples=samples,
        features=FEATURES,
        mode=mode,
    )
    hours = world_model.step_hours * (step + np.arange(horizon + 1))
    recorded = _recorded(world_model, stay, step, horizon)
    at_start = recorded[recorded["hour"] == hours[0]].iloc[0]
    table = trajectory_table(rollouts, parsed, hours, at_start)
    return PatientFutures(parsed, table, outcome_table(rollouts, parsed), recorded)


def simulate_patient(
    world_model: WorldModel,
    episodes: Episodes,
    out: str | Path,
    *,
    stay_id: int | None,
    step: int,
    plans: Sequence[str],
    horizon: int,
    samples: int,
    seed: int,
    mode: str = "corrected",
) -> pd.DataFrame:
    """Simulates one stay and writes fan_chart.png, trajectories.csv, outcomes.csv, manifest.json.

    Args:
      world_model: to simulate in.
      episodes: where the stay is.
      out: folder to write.
      stay_id: which stay; None for the first one with enough steps, for the clinician's plan
        if it is asked for.
      step: row to start from.
      plans: as `worldmodel.simulate.plans.parse_plan` reads them.
      horizon: steps to simulate.
      samples: futures per plan.
      seed: of the noise.
      mode: "corrected" or "reference".

    Returns:
      One row per plan: mortality, total reward, probability of MAP < 65, projections made.

    Raises:
      InputError: no such stay or step, or a malformed plan.
    """
    check_replaceable(Path(out), MARKER)
    check_mode(world_model, mode)
    clinician = any(is_clinician(text) for text in plans)
    stay = find_stay(episodes, stay_id, step, needed=step + (horizon if clinician else 1))
    parsed, table, outcomes, recorded = patient_futures(
        world_model, stay, step=step, plans=plans, horizon=horizon, samples=samples, seed=seed,
        mode=mode,
    )  # fmt: skip
    identity = int(stay.stay_id[0])
    with atomic_folder(Path(out), marker=MARKER) as folder:
        table.to_csv(folder / "trajectories.csv", index=False)
        outcomes.to_csv(folder / "outcomes.csv", index=False)
        title = (
            f"stay {identity} from hour {table['hour'].min():g}: {samples} simulated futures per "
            "plan.  Not for clinical use."
        )
        fan_chart(table, outcomes, recorded, title, folder / "fan_chart.png")
        plan_actions = {plan.name: plan.actions.tolist() for plan in parsed}
        write_json(
            folder / "manifest.json",
            provenance(stay_id=identity, step=step, plans=plan_actions, samples=samples,
                       seed=seed, mode=mode),
        )  # fmt: skip
    return outcomes


def find_stay(episodes: Episodes, stay_id: int | None, step: int, *, needed: int) -> Episodes:
    """One stay.

    Args:
      episodes: where it is.
      stay_id: which; None for the first one with enough steps.
      step: row that it must reach, where any will do.
      needed: steps that are enough.

    Raises:
      InputError: there is no such stay, or none reaches the row.
    """
    length = np.asarray(episodes.length)
    if stay_id is None:
        if step >= length.max():
            raise InputError(f"step: no stay reaches step {step}; the longest has {length.max()}")
        enough = np.flatnonzero(length >= min(needed, length.max()))
        return episodes.select(enough[:1])
    found = np.flatnonzero(np.asarray(episodes.stay_id) == stay_id)
    if not len(found):
        raise InputError(f"stay {stay_id} is not among the {episodes.num_stays} episodes")
    return episodes.select(found)


def _recorded(world_model: WorldModel, stay: Episodes, step: int, horizon: int) -> pd.DataFrame:
    end = min(int(stay.length[0]), step + horizon + 1)
    first = max(0, step + 1 - schema.OUTCOME_WINDOW)
    rows = np.arange(first, end)
    dynamic = np.asarray(stay.dynamic[0, rows])
    columns = {name: dynamic[:, schema.INDEX[name]] for name in FEATURES}
    # The stay once per row, so that all rows are scored in one call.
    score = start_history(world_model, stay.select(np.zeros(len(rows), np.int32)), rows).sofa
    hours = world_model.step_hours * rows
    return pd.DataFrame({"hour": hours, "sofa": np.asarray(score), **columns})


def trajectory_table(
    rollouts: Rollouts, plans: Sequence[Plan], hours: np.ndarray, start: pd.Series
) -> pd.DataFrame:
    """Rows (plan, hour, feature) with mean and quantiles over the futures of one patient.

    Futures count by the probability that the stay reaches the hour.

    Args:
      rollouts: of P = 1 patient.
      plans: the K plans.
      hours: [H + 1] hours since admission, the first being the start.
      start: the recorded values at the start, by feature.
    """
    series = {name: np.asarray(rollouts.feature(name)[0]) for name in rollouts.features}
    series |= {"sofa": np.asarray(rollouts.sofa[0])}
    rows: list[JsonDict] = []
    weights = _weights(rollouts)
    if weights is not None:
        weights = np.pad(weights, ((0, 0), (0, 0), (1, 0)), constant_values=1.0)
    for k, plan in enumerate(plans):
        for name, values in series.items():
            unit = "points" if name == "sofa" else schema.FEATURES[schema.INDEX[name]].unit
            paths = np.concatenate([np.full((len(values[k]), 1), start[name]), values[k]], axis=1)
            found = spread(paths.T, None if weights is None else weights[k].T)
            for h, hour in enumerate(hours):
                row = {"plan": plan.name, "hour": hour, "feature": name, "unit": unit}
                rows.append(row | {column: value[h] for column, value in found.items()})
    return pd.DataFrame(rows)


def outcome_table(rollouts: Rollouts, plans: Sequence[Plan]) -> pd.DataFrame:
    """One row per plan: mortality, total reward, hypotension, ventilation, projections.

    Steps count by the probability that the stay reaches them. Of a recurrent model also the
    support: the least probability of a step of the plan under the clinician.
    """
    mortality = np.asarray(rollouts.mortality[0])
    meanbp = np.asarray(rollouts.feature("meanbp")[0])
    horizon = meanbp.shape[-1]
    weights = _weights(rollouts)
    ventilation = np.asarray(rollouts.ventilation[0])
    table = pd.DataFrame(
        {
            "plan": [plan.name for plan in plans],
            "mortality_mean": mortality.mean(-1),
            "mortality_q05": np.quantile(mortality, 0.05, axis=-1),
            "mortality_q95": np.quantile(mortality, 0.95, axis=-1),
            "total_reward": np.asarray(rollouts.total_reward[0]).mean(-1),
            "map_below_65": np.average(meanbp < MAP_TARGET, (-2, -1), weights),
            "ventilation": np.average(ventilation, (-2, -1), weights),
            "projected_share": np.asarray(rollouts.projected[0]).mean(-1)
            / (horizon * schema.NUM_FEATURES),
        }
    )
    if rollouts.support is not None:
        table["support"] = plan_support(np.asarray(rollouts.support))[0]
    return table


def _weights(rollouts: Rollouts) -> np.ndarray | None:
    """[K, S, H] of the first patient's rows; None without hazards, where all count alike."""
    return None if rollouts.alive is None else weights_of(rollouts.alive[0])
