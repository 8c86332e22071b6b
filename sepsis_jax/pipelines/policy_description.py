"""What policies prescribe in recorded states, beside the clinician."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from policy import registry
from policy.base import Policy
from policy.checkpoint import load_policy
from policy.registry import CLINICIAN
from sepsis_jax.pipelines.episodes import of_split, taken
from sepsis_jax.pipelines.policy_rates import RATES, prescribed_rates, simulated_rates
from sepsis_jax.pipelines.policy_training import CloneConfig, fit_clone
from sepsis_jax.report.html import Picture, Section, Table, write_page
from sepsis_jax.report.policies import action_heat_map, action_shares, difference_heat_map
from sepsis_jax.runs import JsonDict, Progress, provenance, silent
from worldmodel import schema
from worldmodel.episode_files import EPISODES_FILE, load_dose_edges, load_episodes, load_manifest
from worldmodel.episodes import Episodes
from worldmodel.files import atomic_folder, check_replaceable, digest_file, write_json

MARKER = "description.csv"
_LEAST = 1e-12


def describe_policies(
    episodes_path: str | Path,
    out: str | Path,
    policy: list[str],
    *,
    split: str = "test",
    clinician: str | Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Describes policies on recorded stays: heat maps, agreement, levels, rules.

    Args:
      episodes_path: folder of episodes.
      out: folder to write: description.csv, actions.png, difference.png, report.html,
        manifest.json.
      policy: built-in names, folders of policies, or NAME=FOLDER.
      split: "train", "validation", "test" or "all".
      clinician: folder of a cloned clinician; None fits one.
      seed: of the clone and of actions drawn.
      progress: called with (phase, share done).

    Returns:
      One row per policy, the clinician of the records first.
    """
    episodes_path, out = Path(episodes_path), Path(out)
    check_replaceable(out, MARKER)
    policies = registry.find_all(policy)
    progress("reading", 0.0)
    all_stays = load_episodes(episodes_path)
    episodes, _ = of_split(all_stays, split)
    step_hours = float(load_manifest(episodes_path)["step_hours"])
    dose_edges = load_dose_edges(episodes_path)
    progress("clinician", 0.1)
    if clinician is None:
        clone = fit_clone(all_stays, replace(CloneConfig(), seed=seed)).policy
    else:
        clone = load_policy(clinician)
    clinician_probs = clone.action_probs(episodes)
    names = [CLINICIAN, *(name for name in policies if name != CLINICIAN)]
    rows, shares = [], {}
    for number, name in enumerate(names):
        progress(name, 0.4 + 0.5 * number / len(names))
        key = jax.random.fold_in(jax.random.key(seed), number)
        row, share = _describe(
            key,
            policies.get(name),
            episodes,
            clinician_probs,
            step_hours=step_hours,
            dose_edges=dose_edges,
        )
        rows.append({"policy": name, **row})
        shares[name] = share
    table = pd.DataFrame(rows)
    progress("writing", 0.95)
    manifest = provenance(
        episodes={"path": str(episodes_path), "sha256": digest_file(episodes_path / EPISODES_FILE)},
        policies=policy, split=split, stays=episodes.num_stays, seed=seed,
        clinician=None if clinician is None else str(clinician),
    )  # fmt: skip
    _write(out, table, shares, manifest)
    progress("done", 1.0)
    return table


def _describe(
    key: jax.Array,
    policy: Policy | None,
    episodes: Episodes,
    clinician_probs: np.ndarray,
    *,
    step_hours: float,
    dose_edges: schema.DoseEdges,
) -> tuple[dict[str, float], np.ndarray]:
    """A row of the table and [5, 5] shares of the actions."""
    key_policy, key_draw = jax.random.split(key)
    probs = taken(episodes) if policy is None else policy.action_probs(episodes, key=key_policy)
    valid = np.asarray(episodes.valid)
    share = action_shares(probs, valid)
    if policy is None:
        rates = simulated_rates(episodes, step_hours)
    else:
        rates = prescribed_rates(
            key_draw, episodes, probs, step_hours=step_hours, dose_edges=dose_edges
        )
    row = _agreement(probs, clinician_probs, episodes)
    if policy is None:
        row |= {"entropy": np.nan, "kl": np.nan}  # one action was taken, whatever else was likely
    row |= {rate: rates[rate] for rate in RATES}
    for level, label in enumerate(schema.LEVEL_NAMES):
        row[f"vasopressor {label}"] = share[level].sum()
    for level, label in enumerate(schema.LEVEL_NAMES):
        row[f"fluid {label}"] = share[:, level].sum()
    return row, share


def _agreement(
    probs: np.ndarray, clinician_probs: np.ndarray, episodes: Episodes
) -> dict[str, float]:
    """With the actions taken (percent) and, in nats, with the clone's probabilities."""
    valid = np.asarray(episodes.valid)
    rows, clone = probs[valid].astype(np.float64), clinician_probs[valid].astype(np.float64)
    action = np.asarray(episodes.action)[valid]
    log = np.log(np.maximum(rows, _LEAST))
    chosen = rows[np.arange(len(rows)), action]
    return {
        "top1": 100.0 * float((rows.argmax(-1) == action).mean()),
        "probability_of_taken": 100.0 * float(chosen.mean()),
        "kl": float((rows * (log - np.log(np.maximum(clone, _LEAST)))).sum(-1).mean()),
        "entropy": abs(float((rows * log).sum(-1).mean())),
    }


_TEXT = (
    "What each policy would give in the states that the records show. top1: percent of steps in "
    "which its likeliest action is the one taken. kl: nats from the cloned clinician. Rules in "
    "percent of prescriptions; running vasopressor and volume given are the clinician's, whose "
    "row shows what was really given. How patients would have fared is not answered here.",
)


def _write(
    out: Path, table: pd.DataFrame, shares: dict[str, np.ndarray], manifest: JsonDict
) -> None:
    others = {name: share for name, share in shares.items() if name != CLINICIAN}
    with atomic_folder(out, marker=MARKER) as folder:
        table.to_csv(folder / MARKER, index=False)
        write_json(folder / "manifest.json", manifest)
        title = f"What is given, {manifest['split']} split"
        actions, difference = folder / "actions.png", folder / "difference.png"
        pictures = [Picture.of(actions, "Share of decisions by pair of doses")]
        action_heat_map(shares, title, actions)
        if others:
            pictures.append(Picture.of(difference, "Policy less clinician"))
            title = f"Policy less clinician, {manifest['split']} split"
            difference_heat_map(others, shares[CLINICIAN], title, difference)
        write_page(
            folder / "report.html", "Policies in recorded states",
            [Section(f"{manifest['stays']} stays", _TEXT, pictures, (description(table),))],
        )  # fmt: skip


def description(table: pd.DataFrame) -> Table:
    """One column per policy: there are more figures than policies."""
    numbers = table.set_index("policy").T
    rows = [
        (name, *(None if pd.isna(value) else float(value) for value in row))
        for name, row in zip(numbers.index, numbers.to_numpy(), strict=True)
    ]
    return Table("", ("", *numbers.columns), rows)
