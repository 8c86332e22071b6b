"""Off-policy evaluation from files to files.

Off-policy evaluation by playing policies in a world model, beside the other estimators.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from policy import registry
from policy.base import Policy
from policy.checkpoint import load_policy
from policy.clinician import BehaviorFit, fit_behavior
from sepsis_jax import ope
from sepsis_jax.ope import policies, robustness
from sepsis_jax.ope.intervals import mean_of
from sepsis_jax.ope.simulated import SimulatedValue, simulated_value
from sepsis_jax.pipelines.episodes import of_split
from sepsis_jax.pipelines.policies import CLINICIAN, patients_per_call
from sepsis_jax.pipelines.policy_values import typical_horizon
from sepsis_jax.report.html import Section, Table, write_page
from sepsis_jax.runs import Progress, provenance, silent
from worldmodel.episode_files import EPISODES_FILE, load_episodes
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, digest_file, write_json
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.world_model import WorldModel

SHOWN = ("policy", "estimator", "estimate", "low", "high", "difference", "difference_low",
         "difference_high", "ess", "trust", "reason")  # fmt: skip
MARKER = "estimates.csv"
HEADLINES = ("on_policy", "wis", "wpdis", "dm", "dr", "wdr", "world_model")


@dataclass(frozen=True)
class OPEOptions:
    """Settings of an evaluation; see `sepsis_jax.ope.evaluate`.

    Attributes:
      split: "train", "validation", "test" or "all".
      estimators: names with commas between; empty for all that can be had.
      values: "linear", "neural" or "none".
      gamma: discount.
      n_bootstrap: resamples.
      interval: "bca", "percentile", "delta" or "t".
      clip: largest cumulative weight; 0 for no clipping.
      soften: "none", "uniform" or "clinician".
      soften_share: share that softening gives away.
      zero_behavior, row_sums, missing_reward: "error" or a treatment.
      horizon: steps in a world model; 0 for the mean length of the stays.
      samples: futures per stay in a world model; 0 for one per ensemble member.
      seed: of every random choice.
    """

    split: str = "test"
    estimators: str = ""
    values: str = "linear"
    gamma: float = 1.0
    n_bootstrap: int = 2000
    interval: str = "bca"
    clip: float = 0.0
    soften: str = "none"
    soften_share: float = 0.01
    zero_behavior: str = "error"
    row_sums: str = "error"
    missing_reward: str = "error"
    horizon: int = 0
    samples: int = 0
    seed: int = 0


def evaluate_policies(
    episodes_path: str | Path,
    out: str | Path,
    policy: Sequence[str],
    *,
    behavior: str = "recorded",
    model: str | Path | None = None,
    options: OPEOptions | None = None,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Evaluates policies on recorded stays and writes tables, a report and a manifest.

    Args:
      episodes_path: folder of episodes.
      out: folder to write: estimates.csv/.json/.tex, confounding.csv, robustness.csv,
        ess_by_step.csv, behavior.csv where fitted, report.html, manifest.json.
      policy: NAME=FILE with a table of probabilities, NAME=FOLDER with a trained policy, or a
        built-in name.
      behavior: "recorded", a model of `policy.clinician`, or a table of probabilities.
      model: world model to play policies in as well; tables cannot be played.
      options: settings.
      progress: called with (phase, share done).

    Returns:
      The table of `sepsis_jax.ope.evaluate`, with rows "world_model" where one is given.
    """
    options = options or OPEOptions()
    progress("reading", 0.0)
    world_model = None if model is None else load_world_model(model)
    step_hours = None if world_model is None else world_model.step_hours
    everyone = load_episodes(episodes_path, step_hours=step_hours)
    key = jax.random.key(options.seed)
    fit_key, behavior_key, bootstrap_key, group_key = jax.random.split(key, 4)
    del key
    progress("clinician", 0.05)
    full, taken, fits = _behavior(behavior, everyone, behavior_key)
    episodes, chosen = of_split(everyone, options.split)
    full = None if full is None else full[chosen]
    probs, played = _policies(policy, episodes, full, options)
    if fits:
        played[CLINICIAN] = fits[0].policy
    if taken is not None:
        episodes = replace(episodes, behavior_prob=jax.numpy.asarray(taken[chosen]))
    data = ope.from_episodes(episodes, behavior_probs=full, features=ope.state_features(episodes))
    treatment = ope.InputPolicy(
        zero_behavior=options.zero_behavior,
        row_sums=options.row_sums,
        missing_reward=options.missing_reward,
    )
    stays = data.num_stays
    data, probs, treated = ope.check(data, probs, treatment)
    fitted = None
    if options.values != "none":
        progress("fitted values", 0.2)
        fitted = ope.fit(fit_key, data, probs, method=options.values, gamma=options.gamma)
    progress("estimates", 0.5)
    wanted = [name.strip() for name in options.estimators.split(",") if name.strip()]
    clip = ope.Clip(cumulative=(0.0, options.clip)) if options.clip else None
    shared: dict[str, Any] = {
        "estimators": wanted or None, "gamma": options.gamma, "clip": clip,
        "interval": options.interval, "n_bootstrap": options.n_bootstrap, "fitted": fitted,
    }  # fmt: skip
    table = ope.evaluate(data, probs, key=bootstrap_key, **shared)
    if world_model is not None:
        progress("world model", 0.6)
        attrs = table.attrs
        rows = world_model_rows(
            world_model, list(probs), played, episodes,
            horizon=options.horizon, samples=options.samples, seed=options.seed,
        )  # fmt: skip
        table = pd.concat([table, rows], ignore_index=True)
        table.attrs = attrs
    weights = ope.weigh(data, jax.numpy.stack(list(probs.values())), clip)
    confounding = robustness.confounding_table(
        list(probs), data.returns(options.gamma), weights.log_weight[..., -1]
    )
    groups = None
    if treated["stays_dropped"] == 0:
        progress("subgroups", 0.7)
        few = {**shared, "estimators": ("wis",) if fitted is None else ("wis", "wdr")}
        few["n_bootstrap"] = min(options.n_bootstrap, 1000)
        groups = robustness.evaluate_groups(
            data, probs, robustness.groups(episodes), key=group_key, **few
        )
    progress("writing", 0.9)
    facts = {
        "stays": stays, "treated": treated, "fqe_gap": table.attrs["fqe_gap"],
        "behavior": behavior, "behavior_report": fits[0].report if fits else None,
    }  # fmt: skip
    manifest = provenance(
        episodes={"path": str(episodes_path),
                  "sha256": digest_file(Path(episodes_path) / EPISODES_FILE)},
        policies=list(policy), model=None if model is None else str(model),
        options=vars(options), **facts,
    )  # fmt: skip
    _write(Path(out), table, confounding, groups, fits, manifest)
    progress("done", 1.0)
    return table


def _behavior(
    behavior: str, episodes: Episodes, key: jax.Array
) -> tuple[np.ndarray | None, np.ndarray | None, list[BehaviorFit]]:
    """All probabilities where known, those of the taken actions otherwise, fitted models."""
    if behavior == "recorded":
        return None, np.asarray(episodes.behavior_prob), []
    if Path(behavior).suffix in (".csv", ".parquet"):
        return policies.read_probabilities(Path(behavior), episodes), None, []
    fits = fit_behavior(key, episodes, models=(behavior,))
    return fits[0].probs, None, fits


def _policies(
    given: Sequence[str], episodes: Episodes, behavior: np.ndarray | None, options: OPEOptions
) -> tuple[dict[str, Any], dict[str, Policy]]:
    """Probabilities of all, and those that can be played in a world."""
    if not given:
        raise InputError(
            f"--policy: none given; use NAME=FILE, NAME=FOLDER, or {', '.join(registry.names())}"
        )
    probs: dict[str, Any] = {}
    played: dict[str, Policy] = {}
    for text in given:
        name, sign, file = text.partition("=")
        if name in probs or not name:
            raise InputError(f"--policy {text!r}: names must be given and differ")
        if not sign:
            probs[name] = policies.built_in(name, episodes, behavior)
            if name in registry.SIMPLE:
                played[name] = registry.make(name)
            continue
        if Path(file).is_dir():
            played[name] = load_policy(file)
            table = played[name].action_probs(episodes)
        else:
            table = policies.read_probabilities(Path(file), episodes)
        probs[name] = policies.soften(table, options.soften, options.soften_share, behavior)
    return probs, played


def _write(
    out: Path,
    table: pd.DataFrame,
    confounding: pd.DataFrame,
    groups: pd.DataFrame | None,
    fits: list[BehaviorFit],
    manifest: dict[str, Any],
) -> None:
    tables = {"estimates": table, "confounding": confounding}
    if groups is not None:
        tables["subgroups"] = groups
    if fits:
        tables["behavior"] = fits[0].reliability
    steps = pd.DataFrame(table.attrs["ess_step"]).rename_axis("step").reset_index()
    tables["ess_by_step"] = steps
    with atomic_folder(out, marker=MARKER) as folder:
        for name, content in tables.items():
            content.to_csv(folder / f"{name}.csv", index=False)
        write_json(folder / "estimates.json", {"rows": records(table), **_plain(table.attrs)})
        (folder / "estimates.tex").write_text(latex(table))
        write_json(folder / "manifest.json", manifest)
        sections = [_section(name, content, table) for name, content in tables.items()]
        write_page(folder / "report.html", "Off-policy evaluation", sections)


def _plain(attrs: dict[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in attrs.items()}


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with plain numbers, None for what is undefined."""
    return [
        {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in row.items()
        }
        for row in table.astype(object).to_dict("records")
    ]


def latex(table: pd.DataFrame) -> str:
    """A booktabs table: estimators down, policies across; a dagger where trust is lost."""
    policy_names = list(dict.fromkeys(table["policy"]))
    lines = [
        "% Dagger: see the column `reason` of estimates.csv before believing the number.",
        rf"\begin{{tabular}}{{l{'r' * len(policy_names)}}}",
        r"\toprule",
        " & ".join(["estimator", *map(_escaped, policy_names)]) + r" \\",
        r"\midrule",
    ]
    for name, rows in table.groupby("estimator", sort=False):
        by = rows.set_index("policy")
        first, second = [_escaped(name)], [""]
        for policy in policy_names:
            row = by.loc[policy]
            mark = "" if row["trust"] else r"$^\dagger$"
            defined, bounded = np.isfinite(row["estimate"]), np.isfinite([row["low"], row["high"]])
            first.append(f"{row['estimate']:.2f}{mark}" if defined else "--")
            interval = rf"\small({row['low']:.2f}, {row['high']:.2f})"
            second.append(interval if bounded.all() else "")
        lines += [" & ".join(first) + r" \\", " & ".join(second) + r" \\"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(name: object) -> str:
    return re.sub(r"([_%&#$])", r"\\\1", str(name))


_TEXT = {
    "estimates": (
        "Value of every policy by every estimator, with its interval, its difference from the "
        "clinician's mean return in the same resamples, and whether it can be believed.",
    ),
    "confounding": (
        "Least and greatest self-normalised value if something unrecorded moved every weight by "
        "a factor of up to `confounding`.",
    ),
    "subgroups": (
        "The same by kind of patient. `differs_adjusted` divides the level by the number of "
        "groups and policies looked at (Bonferroni).",
    ),
    "behavior": ("Calibration of the fitted clinician on held-out stays.",),
    "ess_by_step": ("Effective sample size of the cumulative weights by step.",),
}


def _section(name: str, content: pd.DataFrame, table: pd.DataFrame) -> Section:
    columns = [c for c in ("group", "stays", *SHOWN) if c in content] if (
        name in ("estimates", "subgroups")
    ) else list(content.columns)  # fmt: skip
    if name == "subgroups":
        columns += ["differs", "differs_adjusted"]
    title = name.replace("_", " ").capitalize()
    text: tuple[str, ...] = _TEXT[name]
    if name == "estimates":
        attrs = table.attrs
        text = (*text, f"{attrs['stays']} stays, {100 * attrs['level']:g}% intervals "
                f"({attrs['interval']}, {attrs['n_bootstrap']} resamples), discount "
                f"{attrs['gamma']:g}. Treated: {attrs['treated']}.")  # fmt: skip
    rows = [tuple(row[column] for column in columns) for row in records(content[columns])]
    return Section(title, text, tables=(Table("", columns, rows),))


ESTIMATOR = "world_model"


def world_model_rows(
    world_model: WorldModel,
    names: Sequence[str],
    played: Mapping[str, Policy],
    episodes: Episodes,
    *,
    horizon: int,
    samples: int,
    seed: int,
) -> pd.DataFrame:
    """One row per policy, as `sepsis_jax.ope.evaluate` has them, with the members' `spread`.

    Differences are from the clinician in the same model, paired, where a clone can be played.

    Args:
      world_model: to play in.
      names: of all policies, in order.
      played: the policies that can be played, and the cloned clinician if there is one.
      episodes: whose first rows are the starts.
      horizon: steps; 0 for the mean length of the stays.
      samples: futures per stay; 0 for one per ensemble member.
      seed: of the noise, which all policies share.
    """
    key = jax.random.key(seed)
    horizon = horizon or typical_horizon(episodes)
    found: dict[str, SimulatedValue] = {
        name: simulated_value(
            world_model, key, episodes, policy, horizon=horizon,
            samples=samples or world_model.num_members, block=patients_per_call(policy),
        )
        for name, policy in played.items()
    }  # fmt: skip
    return pd.DataFrame([_row(name, found.get(name), found.get(CLINICIAN)) for name in names])


def _row(
    name: str, found: SimulatedValue | None, clinician: SimulatedValue | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"policy": name, "estimator": ESTIMATOR, "trust": False}
    if found is None:
        return row | {"estimate": np.nan, "reason": "a table cannot be played in a world model"}
    mean = mean_of(found.total)
    row |= {"estimate": mean.value, "se": mean.se, "low": mean.low, "high": mean.high}
    if clinician is not None and clinician is not found:
        gain = mean_of(found.total - clinician.total)
        row |= {"difference": gain.value, "difference_low": gain.low, "difference_high": gain.high}
    reason = f"the model's own word; its members differ by {found.spread:.2g}"
    return row | {"spread": found.spread, "reason": reason}
