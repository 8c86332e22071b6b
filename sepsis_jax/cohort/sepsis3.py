"""Sepsis-3 stays, and the number left after every exclusion.

Definitions as in mimic-code: an antibiotic order with a culture, and a SOFA of at least 2 (worst
of the last 24 h, hourly) from 48 h before to 24 h after the suspected infection.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sepsis_jax.cohort.workspace import Workspace
from sepsis_jax.runs import JsonDict
from worldmodel.errors import InputError

# derived table -> columns written to `derived_out`.
DERIVED: dict[str, str] = {
    "sepsis3": "*",
    "suspicion": "*",
    "sofa": "*",
    "vasoactive": "*",
    "urine_output": "*",
    "urine_24h": "*",
    "gcs": "*",
    "charlson": "*",
    "ventilation": "*",
    "weight_durations": "*",
    "blood_gas": "*",
    "people": "stay_id, subject_id, hadm_id, intime, outtime, age, nth_stay, died_in_hospital",
}


@dataclass(frozen=True)
class Exclusion:
    """One line of the CONSORT table.

    Attributes:
      step: short name.
      reason: what was left out, in words.
      excluded, remaining: stays left out by this step, and stays after it.
    """

    step: str
    reason: str
    excluded: int
    remaining: int


def narrow_scope(work: Workspace) -> None:
    """Leaves in `stays` only the stays that can still enter the cohort.

    Hourly SOFA of all other stays would be thrown away; with `derived_out` every stay is kept.
    """
    options = work.options
    if options.derived_out is not None:
        return
    conditions = [f"age >= {options.min_age}"]
    if options.stays == "first":
        conditions.append("nth_stay = 1")
    if options.require_sepsis:
        conditions.append("stay_id IN (SELECT stay_id FROM suspicion WHERE suspected_infection)")
    work.execute(
        "DELETE FROM stays WHERE stay_id NOT IN "
        f"(SELECT stay_id FROM people WHERE {' AND '.join(conditions)})"
    )


def find_sepsis(work: Workspace) -> None:
    """Tables `sofa`, `sepsis3` and what they rest on, for every stay in `stays`."""
    for name in ("clock", "ventilation", "gcs", "urine", "blood_gas", "vasoactive"):
        work.run(name)
    work.run("sofa")
    work.run("sepsis3")


def choose_stays(work: Workspace) -> list[Exclusion]:
    """Table `cohort`: the stays that are kept, with their number of steps.

    Returns:
      The CONSORT table.

    Raises:
      InputError: no stay is left.
    """
    options = work.options
    seconds = options.step_hours * 3600
    work.execute(
        "CREATE TABLE candidates AS SELECT p.*, "
        "p.stay_id IN (SELECT stay_id FROM suspicion WHERE suspected_infection) AS suspected, "
        "p.stay_id IN (SELECT stay_id FROM sepsis3) AS septic, "
        "p.stay_id IN (SELECT stay_id FROM clock) AS monitored, "
        f"least({options.num_steps}, "
        f"CAST(ceil(epoch(end_of_stay - intime) / {seconds}) AS INTEGER)) "
        "AS steps FROM people AS p"
    )
    total = work.scalar("SELECT count(*) FROM icustays")
    consort = [Exclusion("source", "all ICU stays", 0, total)]

    def keep(step: str, reason: str, condition: str) -> None:
        work.execute(f"DELETE FROM candidates WHERE NOT coalesce({condition}, false)")
        left = work.scalar("SELECT count(*) FROM candidates")
        consort.append(Exclusion(step, reason, consort[-1].remaining - left, left))

    keep(
        "times",
        "no ICU admission and discharge time, no matching patient, or dead before",
        "end_of_stay > intime",
    )
    keep("age", f"younger than {options.min_age:g} years", f"age >= {options.min_age}")
    if options.stays == "first":
        keep("first", "not the patient's first ICU stay", "nth_stay = 1")
    if options.require_sepsis:
        keep("infection", "no antibiotic order with a culture in time during the stay", "suspected")
        keep("sofa", "SOFA below 2 around the suspected infection", "septic")
    else:
        keep("monitored", "no heart rate recorded", "monitored")
    if options.stays == "first-septic":
        keep(
            "first septic",
            "not the patient's first such ICU stay",
            "stay_id IN (SELECT arg_min(stay_id, intime) FROM candidates GROUP BY subject_id)",
        )
    keep("length", f"shorter than {options.min_steps} steps", f"steps >= {options.min_steps}")
    if not consort[-1].remaining:
        raise InputError(
            "no stay is left after the exclusions ("
            + "; ".join(f"{line.reason}: {line.excluded}" for line in consort[1:])
            + "); relax the options or give more data"
        )
    work.execute(
        "CREATE TABLE cohort AS SELECT CAST(row_number() OVER (ORDER BY stay_id) - 1 AS INTEGER) "
        f"AS row, *, least(end_of_stay, intime + to_seconds(steps * {seconds})) AS endtime "
        "FROM candidates"
    )
    return consort


def count_doubts(work: Workspace) -> JsonDict:
    """Counts of stays of the cohort whose sepsis or deaths need a second look."""
    early = (
        "SELECT count(*) FROM cohort AS c INNER JOIN sepsis3 AS s USING (stay_id) "
        "WHERE s.sofa_time < c.intime"
    )
    cut = "SELECT count(*) FROM cohort WHERE end_of_stay < outtime"
    counts = {
        "septic stays whose SOFA first reached 2 before ICU admission": work.scalar(early),
        "stays that end at death, before the unit was left": work.scalar(cut),
    }
    return {name: int(count) for name, count in counts.items() if count}


def write_derived(work: Workspace, folder: Path) -> None:
    """Writes the derived tables of all stays as Parquet into an existing folder."""
    for name, columns in DERIVED.items():
        file = str(folder / f"{name}.parquet").replace("'", "''")
        work.execute(f"COPY (SELECT {columns} FROM {name}) TO '{file}' (FORMAT parquet)")
