"""Off-policy evaluation from files to files: reads, calls `estimate_policies`, writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd

from policy import registry
from policy.base import Policy
from policy.checkpoint import load_policy
from policy.clinician import BehaviorFit, fit_behavior
from policy.registry import CLINICIAN
from sepsis_jax.ope import policies
from sepsis_jax.ope.agent_runs import is_run, read_run
from sepsis_jax.ope.estimated_clinician import ClinicianFit, cross_fit
from sepsis_jax.pipelines.episodes import of_split
from sepsis_jax.pipelines.leakage import audit_episodes
from sepsis_jax.pipelines.ope_estimates import (
    OPEOptions,
    OPEResult,
    estimate_policies,
    ope_keys,
)
from sepsis_jax.pipelines.verdicts import Check, check_rows, section, summary_line
from sepsis_jax.report.figures import forest_figure
from sepsis_jax.report.html import write_page
from sepsis_jax.report.ope import HEADLINES, latex, records, sections
from sepsis_jax.runs import Progress, provenance, silent
from worldmodel import schema
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

MARKER = "estimates.csv"


def evaluate_policies(
    episodes_path: str | Path,
    out: str | Path,
    policy: Sequence[str],
    *,
    behavior: str = "recorded",
    model: str | Path | None = None,
    options: OPEOptions | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluates policies on recorded stays and writes tables, a report and a manifest.

    Args:
      episodes_path: folder of episodes.
      out: folder to write: estimates.csv/.json/.tex, confounding.csv, robustness.csv,
        ess_by_step.csv, audit.csv, behavior.csv where fitted, report.html, manifest.json.
      policy: NAME=FILE with a table of probabilities, NAME=FOLDER with a trained policy or an
        agent's run over recorded states, or a built-in name.
      behavior: "recorded", a model of `policy.clinician`, or a table of probabilities.
      model: world model to run policies in as well; tables of probabilities cannot be run.
      options: settings.
      progress: called with (phase, share done).

    Returns:
      The estimates and what they were made of.
    """
    options = options or OPEOptions()
    check_replaceable(Path(out), MARKER)
    keys = ope_keys(options.seed)
    progress("reading", 0.0)
    world_model = None if model is None else load_world_model(model)
    all_stays = load_episodes_for(world_model, episodes_path)
    progress("clinician", 0.05)
    episodes, chosen = of_split(all_stays, options.split)
    known = _behavior(behavior, all_stays, chosen, keys.behavior, options)
    full, fits = known.probs, known.fits
    probs, runnable = open_policies(policy, episodes, full)
    run_in_model = {**runnable, CLINICIAN: fits[0].policy} if fits else runnable
    result = estimate_policies(
        episodes, softened(probs, policy, full, options), run_in_model, keys=keys,
        options=options, behavior_probs=full, clinician=known.estimated, world_model=world_model,
        progress=progress,
    )  # fmt: skip
    progress("audit", 0.85)
    checks = audit_episodes(
        all_stays,
        dose_edges=load_dose_edges(episodes_path),
        step_hours=load_manifest(episodes_path).get("step_hours", schema.STEP_HOURS),
        seed=options.seed,
    ).checks
    result.table.attrs["audit"] = summary_line(checks)
    progress("writing", 0.9)
    manifest = provenance(
        episodes={"path": str(episodes_path),
                  "sha256": digest_file(Path(episodes_path) / EPISODES_FILE)},
        policies=list(policy), model=None if model is None else str(model),
        options=vars(options), stays=result.stays, treated=result.treated,
        fqe_gap=result.table.attrs["fqe_gap"], behavior=behavior,
        behavior_report=fits[0].report if fits else None,
    )  # fmt: skip
    _write(Path(out), result, fits, checks, manifest)
    progress("done", 1.0)
    return Evaluation(result.table, result.groups, probs, runnable, checks)


class Evaluation(NamedTuple):
    """Off-policy estimates of K policies, and what they were made of.

    Attributes:
      table: of `sepsis_jax.ope.evaluate`, with rows "world_model" where one was given; its
        attribute "audit" says in one line what the audit of the episodes found.
      groups: of `sepsis_jax.ope.robustness.evaluate_groups`.
      probs: [N, T, 25] of every policy as it was given, not softened.
      runnable: policies that can be run in a world.
      checks: of the episodes.
    """

    table: pd.DataFrame
    groups: pd.DataFrame
    probs: Mapping[str, np.ndarray | jax.Array]
    runnable: Mapping[str, Policy]
    checks: Sequence[Check]


class _Behavior(NamedTuple):
    """The clinician's probabilities in the evaluated stays, and where they come from."""

    probs: np.ndarray | None  # [N, T, 25]; None where only those of the recorded actions are known
    fits: list[BehaviorFit]
    estimated: ClinicianFit | None  # None where they are true


def _behavior(
    behavior: str, episodes: Episodes, chosen: np.ndarray, key: jax.Array, options: OPEOptions
) -> _Behavior:
    """What is known of the clinician; fitted without the stays `chosen`, or cross-fitted."""
    if behavior == "recorded":
        return _Behavior(None, [], None)
    if Path(behavior).suffix in (".csv", ".parquet"):
        stays = options.behavior_stays
        table = policies.read_probabilities(Path(behavior), episodes.select(chosen))
        return _Behavior(table, [], ClinicianFit(stays) if stays else None)
    fits = fit_behavior(key, episodes, models=(behavior,))
    split = np.asarray(episodes.split)
    if (split[chosen] == schema.SPLITS.index("test")).all():
        stays = int((split == schema.SPLITS.index("train")).sum())
        return _Behavior(fits[0].probs[chosen], fits, ClinicianFit(stays))
    own = jax.random.fold_in(key, 1)
    probs = cross_fit(own, episodes, behavior, options.behavior_folds)
    folds = options.behavior_folds
    stays = episodes.num_stays * (folds - 1) * 4 // (5 * folds)  # a fifth of the others calibrates
    shared = len(chosen) == episodes.num_stays
    return _Behavior(probs[chosen], fits, ClinicianFit(stays, shared=shared))


def open_policies(
    given: Sequence[str], episodes: Episodes, behavior: np.ndarray | None
) -> tuple[dict[str, np.ndarray | jax.Array], dict[str, Policy]]:
    """Probabilities [N, T, 25] of all policies, and those that can be run in a world.

    Args:
      given: as for `evaluate_policies`.
      episodes: N recorded stays.
      behavior: [N, T, 25] of the clinician; None if they are not known.

    Raises:
      InputError: none is given, a name comes twice, or a file cannot be read.
    """
    if not given:
        raise InputError(
            f"policy: none given; use NAME=FILE, NAME=FOLDER, or {', '.join(registry.names())}"
        )
    probs: dict[str, np.ndarray | jax.Array] = {}
    runnable: dict[str, Policy] = {}
    for text in given:
        name, sign, file = text.partition("=")
        if name in probs or not name:
            raise InputError(f"policy {text!r}: names must be given and differ")
        if not sign:
            table = policies.built_in(name, episodes, behavior)
            if name in registry.SIMPLE:
                runnable[name] = registry.make(name)
        elif is_run(Path(file)):
            table = read_run(Path(file), episodes).probs
        elif Path(file).is_dir():
            runnable[name] = load_policy(file)
            table = runnable[name].action_probs(episodes)
        else:
            table = policies.read_probabilities(Path(file), episodes)
        probs[name] = table
    return probs, runnable


def softened(
    probs: Mapping[str, np.ndarray | jax.Array],
    given: Sequence[str],
    behavior: np.ndarray | None,
    options: OPEOptions,
) -> dict[str, np.ndarray | jax.Array]:
    """Probabilities as they are weighted, those of the built-in clinician as they are.

    Softening mends policies that hardly ever do what the clinician does.

    Args:
      probs, given, behavior: of `open_policies`, and its arguments.
      options: how probabilities are softened.
    """
    return {
        name: policies.soften(
            table, "none" if name == CLINICIAN and CLINICIAN in given else options.soften,
            options.soften_share, behavior,
        )
        for name, table in probs.items()
    }  # fmt: skip


def _write(
    out: Path,
    result: OPEResult,
    fits: list[BehaviorFit],
    checks: Sequence[Check],
    manifest: Mapping[str, object],
) -> None:
    table = result.table
    tables = {"estimates": table, "confounding": result.confounding}
    if len(result.groups):
        tables["subgroups"] = result.groups
    if fits:
        tables["behavior"] = fits[0].reliability
    steps = pd.DataFrame(table.attrs["ess_step"]).rename_axis("step").reset_index()
    tables["ess_by_step"] = steps
    with atomic_folder(out, marker=MARKER) as folder:
        for name, content in tables.items():
            content.to_csv(folder / f"{name}.csv", index=False)
        attrs = {str(name): value for name, value in table.attrs.items()}
        write_json(folder / "estimates.json", {"rows": records(table), **attrs})
        (folder / "estimates.tex").write_text(latex(table))
        write_json(folder / "manifest.json", manifest)
        level = f"{100 * table.attrs['level']:g}% intervals"
        title = f"{result.stays} stays; {level}.  Not for clinical use."
        shown = table[table["estimator"].isin(HEADLINES)]
        forest_figure(shown, title, folder / "forest.png")
        pd.DataFrame(check_rows(checks)).to_csv(folder / "audit.csv", index=False)
        parts = [*sections(tables), section(checks)]
        write_page(folder / "report.html", "Off-policy evaluation", parts)
