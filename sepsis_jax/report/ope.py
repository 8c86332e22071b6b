"""Report of an off-policy evaluation: plain rows, a LaTeX table, sections of the HTML page."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from sepsis_jax.report.html import Section, Table

SHOWN = ("policy", "estimator", "estimate", "low", "high", "difference", "difference_low",
         "difference_high", "ess", "expected_ess", "conclusion", "confounding", "trust",
         "reason")  # fmt: skip
HEADLINES = ("on_policy", "wis", "wpdis", "dm", "dr", "wdr", "world_model")


def records(table: pd.DataFrame) -> list[dict[str, object]]:
    """Rows with plain numbers, None for what is undefined."""
    return [
        {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in row.items()
        }
        for row in table.astype(object).to_dict("records")
    ]


def trust_words(row: Mapping[str, object]) -> str:
    """Whether to believe a row: no, or yes up to the confounding at which its conclusion falls."""
    if not row["trust"]:
        return "no"
    strength = row.get("confounding")
    return f"yes, to Gamma {strength:.2f}" if isinstance(strength, float) else "yes"


def latex(table: pd.DataFrame) -> str:
    """A booktabs table: a row per estimator, a column per policy, a dagger if untrusted."""
    policy_names = list(dict.fromkeys(table["policy"]))
    lines = [
        "% Dagger: see the column `reason` of estimates.csv before believing the number.",
        rf"\begin{{tabular}}{{l{'r' * len(policy_names)}}}",
        r"\toprule",
        " & ".join(["estimator", *map(escaped, policy_names)]) + r" \\",
        r"\midrule",
    ]
    for name, rows in table.groupby("estimator", sort=False):
        by = rows.set_index("policy")
        first, second = [escaped(name)], [""]
        for policy in policy_names:
            row = by.loc[policy]
            mark = "" if row["trust"] else r"$^\dagger$"
            defined, bounded = np.isfinite(row["estimate"]), np.isfinite([row["low"], row["high"]])
            first.append(f"{row['estimate']:.2f}{mark}" if defined else "--")
            interval = rf"\small({row['low']:.2f}, {row['high']:.2f})"
            second.append(interval if bounded.all() else "")
        lines += [" & ".join(first) + r" \\", " & ".join(second) + r" \\"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escaped(name: object) -> str:
    """Text with the special characters of LaTeX escaped."""
    return re.sub(r"([_%&#$])", r"\\\1", str(name))


_TEXT = {
    "estimates": (
        "Value of every policy by every estimator, with its interval, its difference from the "
        "clinician's mean return on the same stays, and whether it can be believed: never more "
        "than up to the `confounding` (Gamma) at which its conclusion falls, the factor by which "
        "something unrecorded would have to move the weights of stays.",
    ),
    "confounding": (
        "Least and greatest self-normalised value if something unrecorded moved every weight by "
        "a factor of up to `confounding`. Whether they exclude the clinician's value is said only "
        "of trusted estimates.",
    ),
    "subgroups": (
        "The same by kind of patient. `differs_adjusted` divides the level by the number of "
        "groups and policies looked at (Bonferroni); both are said only of trusted estimates.",
    ),
    "behavior": ("Calibration of the fitted clinician on held-out stays.",),
    "ess_by_step": ("Effective sample size of the cumulative weights by step.",),
}


def sections(tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    """One section per table, in order.

    Args:
      tables: by name; "estimates" must be among them, with the attributes of
        `sepsis_jax.ope.evaluate`.
    """
    attrs = tables["estimates"].attrs
    return [_section(name, content, attrs) for name, content in tables.items()]


# attributes of a table, of several types
def _section(name: str, content: pd.DataFrame, attrs: Mapping[Hashable, Any]) -> Section:
    columns = [c for c in ("group", "stays", *SHOWN) if c in content] if (
        name in ("estimates", "subgroups")
    ) else list(content.columns)  # fmt: skip
    if name == "subgroups":
        columns += ["differs", "differs_adjusted"]
    title = name.replace("_", " ").capitalize()
    text: tuple[str, ...] = _TEXT[name]
    if name == "estimates":
        text = (*text, f"{attrs['stays']} stays, {100 * attrs['level']:g}% intervals "
                f"({attrs['interval']}, {attrs['n_bootstrap']} resamples), discount "
                f"{attrs['gamma']:g}. Treated: {attrs['treated']}.")  # fmt: skip
    rows = [tuple(row[column] for column in columns) for row in records(content[columns])]
    return Section(title, text, tables=(Table("", columns, rows),))
