"""The report of an evaluation: one page, and every table as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from policy.agent.records import Record
from sepsis_jax.pipelines.example_futures import ExampleFutures
from sepsis_jax.pipelines.verdicts import Check, section
from sepsis_jax.report import published as paper
from sepsis_jax.report import words
from sepsis_jax.report.examples import dialogue_section, futures_section, provenance_section
from sepsis_jax.report.html import Picture, Section, Table, write_page
from sepsis_jax.report.panels import calibration, forest, heat_maps, sample_sizes
from sepsis_jax.report.patients import patient_sections
from sepsis_jax.report.tables import write_tables
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.files import write_json

TITLES = {
    "world_model": "World model",
    "policies": "Policies",
    "stages": "Stages of training",
}
FIGURES = "figures"
_TEXT = {
    "world_model": (
        "Errors of the next row in standard deviations over values that were really measured; "
        "errors some hours ahead in units of the value, of the mean simulated future under the "
        "clinician. 95% intervals over stays.",
    ),
    "policies": (
        "A value is the mean total reward of a stay (a survivor ends with +15, a death with -15). "
        "DR is the doubly robust estimate, WIS and WPDIS are weighted importance sampling over "
        "whole stays and per decision, all from recorded stays with 95% intervals. Hollow points "
        "and \"no\" mark estimates that the records cannot carry; the next table says why. "
        "Rates are percent of prescriptions in recorded states.",
        "A policy that is not here was not given; no row is filled in for it.",
    ),
    "stages": (
        "The language model after each stage. Estimates, adherence and unsafe prescriptions come "
        "from recorded states, where the stage was asked there; predictions of mortality and of "
        "vasopressor need are answered without the simulator; the true value is that of treating "
        "fresh synthetic patients, valid calls those that could be carried out.",
    ),
}  # fmt: skip
_TRUTH = (
    "The patients are synthetic, so the true value of every policy that can be run is known from "
    "fresh patients of the same world: diamonds in the figure, the first column of the table."
)
COLUMNS = {
    "policies": ("true", "wis", "trust", "ess", "less_clinician", "dr", "wpdis", "wpdis_alive",
                 "world_model", "adherence", "underdosing", "overdosing"),
    "stages": ("true", "valid", "dr", "wis", "wpdis", "adherence", "unsafe", "mortality_auroc",
               "mortality_auprc", "vasopressor_auroc", "vasopressor_auprc"),
}  # fmt: skip
SHORT = {
    "policies": ("wis", "less_clinician", "ess", "trust", "adherence", "true"),
    "stages": ("wis", "adherence", "mortality_auroc", "vasopressor_auroc", "true", "valid"),
}
"""Columns that fit a terminal."""


@dataclass(frozen=True)
class Findings:
    """All that a report shows; what is None or empty was not given and has no section.

    Attributes:
      episodes: the whole cohort.
      manifest: of its folder.
      split: that is evaluated.
      policies: of `pipelines.evaluation.policy_table`.
      ess_by_step: effective sample size by step of the weights of each policy.
      needed: effective sample size below which no estimate is trusted.
      shares: [5, 5] percent of decisions by pair of doses, by policy.
      groups: of `pipelines.policy_rates.group_table`.
      checks: of the audit.
      facts: the manifest of the report.
      world_model: of `pipelines.world_model_table.world_model_table`.
      calibration: of `pipelines.world_model_table.calibration_table`.
      stages: of `pipelines.evaluation.stage_table`.
      futures: of single patients.
      dialogues: records of language models, by policy.
      published: show the figures of the paper beside ours.
    """

    episodes: Episodes
    manifest: JsonDict
    split: str
    policies: pd.DataFrame
    ess_by_step: Mapping[str, Sequence[float]]
    needed: float
    shares: Mapping[str, np.ndarray]
    groups: pd.DataFrame
    checks: Sequence[Check]
    facts: JsonDict
    world_model: pd.DataFrame | None = None
    calibration: pd.DataFrame | None = None
    stages: pd.DataFrame | None = None
    futures: Sequence[ExampleFutures] = ()
    dialogues: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    published: bool = False


def write_report(folder: Path, findings: Findings) -> None:
    """Writes report.html, every table as .csv and .tex, tables.json, figures and a manifest."""
    sections = report_sections(findings, folder / FIGURES)
    ranks = findings.policies.attrs.get("rank_correlation")
    write_tables(folder, sections, rank_correlation=ranks)
    write_json(folder / "manifest.json", findings.facts)
    write_page(folder / "report.html", "Evaluation", sections)


def report_sections(findings: Findings, figures: Path) -> list[Section]:
    """All parts of the page, in order.

    Args:
      findings: what was found.
      figures: folder of pictures, to write into.
    """
    found = findings
    sections = patient_sections(found.episodes, found.manifest, split=found.split)
    hours = float(found.manifest.get("step_hours", schema.STEP_HOURS))
    if found.world_model is not None:
        table = named_table("world_model", found.world_model, "", hours)
        pictures, tables = calibration_parts(found.calibration, figures)
        sections.append(
            Section(TITLES["world_model"], _TEXT["world_model"], pictures, (table, *tables))
        )
    sections += [
        _policies(found, figures),
        _sample_sizes(found, figures),
        actions_section(found.shares, figures),
        _subgroups(found.groups),
    ]
    if found.stages is not None:
        tables = [named_table("stages", found.stages, "")]
        text = _TEXT["stages"]
        if found.published:
            tables.append(_published("stages", paper.STAGES))
        sections.append(Section(TITLES["stages"], text, tables=tables))
    if found.futures:
        sections.append(futures_section(found.futures, figures))
    if found.dialogues:
        sections.append(dialogue_section(found.dialogues))
    return [*sections, section(found.checks), provenance_section(found.facts)]


def calibration_parts(
    bins: pd.DataFrame | None, figures: Path
) -> tuple[list[Picture], list[Table]]:
    """Picture and table of the calibration of mortality; nothing without it."""
    if bins is None:
        return [], []
    moments = {"last": "last row of each stay", "every": "every row"}
    rows = [
        (moments[row["when"]], row["who"], f"{row['predicted']:.1f}", _cell(row, "observed"),
         row["rows"], row["stays"])
        for _, row in bins.iterrows()
    ]  # fmt: skip
    columns = ("rows used", "model", "predicted mortality, %", "observed mortality, %", "rows",
               "stays")  # fmt: skip
    table = Table(
        "Calibration of predicted mortality", columns, rows, "calibration", bins, folded=True
    )
    return [calibration(bins, figures)], [table]


def _policies(found: Findings, figures: Path) -> Section:
    picture = forest(found.policies, figures)
    tables = [named_table("policies", found.policies, "")]
    if "reason" in found.policies:
        rows = [
            (words.policy(row["policy"]), row["reason"] or "nothing found")
            for row in found.policies.to_dict("records")
            if isinstance(row["reason"], str)
        ]
        tables.append(Table("What speaks against each estimate by WIS",
                            ("policy", words.column("reason")), rows, "reasons"))  # fmt: skip
    text = _TEXT["policies"]
    if "true" in found.policies:
        text = (*text, _TRUTH)
    if found.published:
        tables.append(_published("policies", paper.POLICIES))
    return Section(TITLES["policies"], text, [picture] if picture else (), tables)


def _published(name: str, table: pd.DataFrame) -> Table:
    columns = [words.column(column) for column in table.columns]
    places = [4 if name.endswith(("auroc", "auprc")) else 2 for name in table.columns[1:]]
    rows = [
        (words.stage(row[0]), *(f"{x:.{n}f}" for x, n in zip(row[1:], places, strict=True)))
        for row in table.itertuples(index=False)
    ]
    title = "Published (SepsisAgent), not comparable blindly"
    return Table(title, columns, rows, f"published_{name}", table, paper.CAVEATS)


def _sample_sizes(found: Findings, figures: Path) -> Section:
    table = pd.DataFrame(found.ess_by_step).rename_axis("step").reset_index()
    table["step"] += 1
    stays = int(found.facts["stays"])
    picture = sample_sizes(found.ess_by_step, stays, found.needed, figures)
    shown = [1, 2, 3, *range(6, len(table) + 1, 3)]
    rows = [
        tuple(row.values()) for row in table[table["step"].isin(shown)].round(1).to_dict("records")
    ]
    columns = ("steps since admission", *map(words.policy, found.ess_by_step))
    return Section(
        "Effective sample sizes",
        ("How far the records carry: a policy that often differs from the clinician is followed by "
         "few recorded stays to the end, and an estimate rests on those few.",),
        (picture,),
        (Table("Effective sample size, stays", columns, rows, "ess_by_step", table, folded=True),),
    )  # fmt: skip


def actions_section(shares: Mapping[str, np.ndarray], figures: Path) -> Section:
    """What each policy gives in recorded states: heat maps and their numbers."""
    rows = [
        (name, schema.LEVEL_NAMES[vasopressor].lower(), schema.LEVEL_NAMES[fluid].lower(), share)
        for name, of in shares.items()
        for (vasopressor, fluid), share in np.ndenumerate(of)
    ]
    data = pd.DataFrame(rows, columns=["policy", "vasopressor", "fluid", "percent"])
    kept = [(words.policy(row[0]), *row[1:3], f"{row[3]:.1f}") for row in rows if row[3] >= 5.0]
    table = Table(
        "Pairs of doses given in at least 5% of decisions",
        ("policy", "vasopressor", "fluid", "share of decisions, %"), kept, "action_shares", data,
        folded=True,
    )  # fmt: skip
    text = "Shares are expected ones where a policy is not deterministic."
    return Section("What is given", (text,), (heat_maps(shares, figures),), (table,))


def _subgroups(groups: pd.DataFrame) -> Section:
    policies = list(dict.fromkeys(groups["policy"]))
    columns = ("kind of patient", "stays", "died, %", *map(words.policy, policies))

    def rows(name: str, of: Sequence[str]) -> list[tuple[object, ...]]:
        lines = []
        for group, own in groups.groupby("group", sort=False):
            first, by = own.iloc[0], own.set_index("policy")
            head = (group, int(first["stays"]), _percent(first["mortality"]))
            lines.append((*head, *(_group_cell(by.loc[policy], name) for policy in of)))
        return lines

    adherence = Table("Keeps to both guideline rules, % of prescriptions", columns,
                      rows("adherence", policies), "subgroups", groups)  # fmt: skip
    value = Table(
        "Value by WIS, total reward", columns, rows("wis", policies), "subgroup_values",
        groups[["group", "stays", "policy", *[c for c in groups if c.startswith("wis")],
                *[c for c in ("trust", "reason") if c in groups]]],
        notes=("† the records cannot carry the estimate; a dash: no recorded stay of the group "
               "followed the policy. The clinician's is the mean of the records.",),
    )  # fmt: skip
    return Section(
        "Kinds of patients",
        ("The same by what was known in the first 24 hours, with 95% intervals. Many groups are "
         "looked at, so one that stands out may do so by chance. Groups too small to say anything "
         "say so.",),
        tables=(adherence, value),
    )  # fmt: skip


def _percent(value: float) -> str | None:
    return f"{value:.1f}" if np.isfinite(value) else None


def _group_cell(row: pd.Series, name: str) -> object:
    if row["small"]:
        return "too few stays"
    shown = _cell(row, name)
    untrusted = name == "wis" and shown is not None and not row["trust"]
    return f"{shown} †" if untrusted else shown


def named_table(
    name: str, table: pd.DataFrame, title: str, hours: float = schema.STEP_HOURS
) -> Table:
    """A table of `TITLES` as a section shows it."""
    return Table(title, *cells(name, table, hours=hours), name, table)


def cells(
    name: str,
    table: pd.DataFrame,
    columns_shown: Sequence[str] | None = None,
    hours: float = schema.STEP_HOURS,
) -> tuple[list[str], list[tuple[object, ...]]]:
    """Headings and rows, each value with its interval in one cell; what is undefined is None.

    Args:
      name: of the table.
      table: with a column per value, and its `_low` and `_high`.
      columns_shown: all of the report if not given.
      hours: per row of a stay.
    """
    if name == "world_model":
        columns = [words.column("metric"), *dict.fromkeys(table["who"])]
        by = table.set_index(["metric", "who"])
        return columns, [
            (words.metric(metric, hours),
             *(_cell(by.loc[(metric, who)], "value") if (metric, who) in by.index else None
               for who in columns[1:]))
            for metric in dict.fromkeys(table["metric"])
        ]  # fmt: skip
    first = str(table.columns[0])
    called = words.policy if first == "policy" else words.stage
    shown = [column for column in columns_shown or COLUMNS[name] if column in table]
    rows = [
        (called(row[first]), *(_cell(row, column) for column in shown))
        for _, row in table.iterrows()
    ]
    return [words.column(first), *map(words.column, shown)], rows


def _cell(row: pd.Series, name: str) -> object:
    value = row[name]
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, float | int | np.number):
        return None if value is None or pd.isna(value) else value
    value = float(value)
    if not np.isfinite(value):
        return None
    low, high = (row.get(end, np.nan) for end in (_end(name, "low"), _end(name, "high")))
    places = digits(name, value)
    if not (np.isfinite(low) and np.isfinite(high)):
        return words.number(value, places)
    low_text, high_text = (words.number(end, places) for end in (low, high))
    return f"{words.number(value, places)} ({low_text} to {high_text})"


_ONE_DECIMAL = ("adherence", "valid", "observed", "ess")


def digits(name: str, value: float = 0.0) -> int:
    """Decimals: one of large percents, two of rewards and rare faults, three of AUROC and AUPRC."""
    if name in _ONE_DECIMAL:
        return 1
    if name == "value":  # of a world model, in units of its own
        return 1 if abs(value) >= 20 else 2 if abs(value) >= 1 else 3
    return 3 if name.endswith(("auroc", "auprc")) else 2


def _end(name: str, end: str) -> str:
    return end if name == "value" else f"{name}_{end}"
