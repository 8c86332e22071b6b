"""Options of a cohort: one for every choice that published definitions make differently."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sepsis_jax.runs import JsonDict
from worldmodel.errors import InputError
from worldmodel.imputation import hold_steps
from worldmodel.resources import usable_cores

CHOICES: dict[str, tuple[object, ...]] = {
    "step_hours": (1, 2, 4, 8),
    "stays": ("first", "first-septic", "all"),
    "mimic_code": ("2026-07", "before"),
    "vasopressor_factors": ("mimic-code", "ai-clinician"),
    "vasopressor_dose": ("max", "time-weighted"),
    "base_excess": ("keep", "positive-only"),
    "gcs_intubated": ("raw", "mimic-code"),
    "blood_gas": ("arterial", "all"),
    "age": ("years", "fractional"),
    "charlson_age_bands": ("2026-07", "before"),
    "timing": ("known-before", "same-step"),
    "sofa": ("row", "rolling-24h", "step"),
    "ventilation": ("invasive", "invasive-or-tracheostomy"),
    "missing_urine": ("zero", "impute"),
    "death_clock": ("icu-admission", "hospital-admission"),
    "sofa_values": ("features", "mimic-code"),
    "unknown_units": ("error", "drop"),
}

EDGES = ("vasopressor_edges", "fluid_edges")
RISING = "three doses above 0 that do not fall"
SHARES = "three shares that add up to 1, the first above 0"


def are_edges(edges: tuple[float, ...] | None) -> bool:
    """Whether these may be upper edges of dose levels 1 to 3; None may."""
    return edges is None or (len(edges) == 3 and 0 < edges[0] <= edges[1] <= edges[2])


def are_shares(split: tuple[float, ...]) -> bool:
    """Whether these may be the shares of training, validation and test."""
    return len(split) == 3 and abs(sum(split) - 1) < 1e-6 and min(split) >= 0 and split[0] > 0


@dataclass(frozen=True)
class CohortOptions:
    """Choices behind a cohort; the defaults are explained in docs/cohort.md.

    Attributes:
      step_hours: length of a step: 1, 2, 4 or 8 hours, counted from ICU admission.
      max_hours: longest part of a stay that is kept, from ICU admission.
      min_steps: shortest stay that is kept.
      min_age: youngest age at hospital admission, in years.
      stays: "first" ICU stay of each patient, the patient's "first-septic" one, or "all".
      require_sepsis: keep Sepsis-3 stays only; False keeps every ICU stay with a heart rate.
      mimic_code: revision of mimic-code that Sepsis-3 and the derived tables follow: since
        "2026-07", or "before" (as packaged in m4-infra 0.5.9).
      vasopressor_factors: norepinephrine equivalents after "mimic-code" or the "ai-clinician".
      extended_vasopressors: also count the newer phenylephrine items and angiotensin II, which
        mimic-code leaves out.
      extended_antibiotics: also count the antibiotics that mimic-code's list lacks, such as
        ertapenem and daptomycin.
      vasopressor_dose: the "max" rate within a step or the "time-weighted" mean.
      cap_vasopressors: reduce implausible rates to the cap of the drug (counted).
      base_excess: "keep" every sign, or "positive-only" as the reference system's scaler shows.
      gcs_intubated: "raw" charted parts (verbal 1 when intubated), or the "mimic-code" rule
        (a patient who cannot speak for a tube counts as 15).
      blood_gas: PaO2, PaCO2 and pH from "arterial" samples or from "all" samples.
      age: whole "years" (anchor age plus calendar years, as in BigQuery) or "fractional" (as
        mimic-code's DuckDB translation has it).
      charlson_age_bands: bands with upper ends excluded ("2026-07") or included ("before").
      timing: what row t holds: what is "known-before" its treatment begins, that is values,
        urine, ventilation and scores of the step that ended at t; or those of the "same-step" in
        which the treatment is given, as published work does, which lets a row know the effect
        of its own treatment.
      sofa: of each row: scored from the "row" itself and the vasopressor of the step before, as
        simulated rows are; mimic-code's worst of the last 24 h ("rolling-24h"); or the worst
        within the "step", unmeasured parts counting 0.
      sofa_values: what the hourly SOFA of Sepsis-3 scores: the values of the "features", that is
        within their ranges and with results below or above a limit taken at the limit; or what
        "mimic-code" scores, every number and no limit.
      ventilation: "invasive", or "invasive-or-tracheostomy".
      missing_urine: steps without a record are "zero" mL, or left to "impute".
      max_urine_ml: a single urine record above this is a charting error (dropped, counted).
      vasopressor_edges, fluid_edges: upper edges of dose levels 1 to 3, as of a model that the
        episodes are for (mcg/kg/min, mL per step); None takes the quartiles of the training
        split's doses.
      carry_forever: hold a measurement without time limit.
      death_days: horizon of the death flag, in days.
      death_clock: day 0 of that horizon: "icu-admission" or "hospital-admission".
      unknown_units: "error" stops at a unit that is not known; "drop" leaves the rows out and
        counts them.
      split: shares of patients for training, validation and test.
      seed: of the split.
      threads: of DuckDB; None takes every core.
      memory_limit: of DuckDB, such as "8GB"; what does not fit goes to disk.
      derived_out: folder for the derived tables of all stays, as Parquet; None writes none.
    """

    step_hours: int = 4
    max_hours: float = 80.0
    min_steps: int = 2
    min_age: float = 18.0
    stays: str = "first"
    require_sepsis: bool = True
    mimic_code: str = "2026-07"
    vasopressor_factors: str = "mimic-code"
    extended_vasopressors: bool = False
    extended_antibiotics: bool = False
    vasopressor_dose: str = "max"
    cap_vasopressors: bool = True
    base_excess: str = "keep"
    gcs_intubated: str = "raw"
    blood_gas: str = "arterial"
    age: str = "years"
    charlson_age_bands: str = "2026-07"
    timing: str = "known-before"
    sofa: str = "row"
    sofa_values: str = "features"
    ventilation: str = "invasive"
    missing_urine: str = "zero"
    max_urine_ml: float = 5000.0
    vasopressor_edges: tuple[float, ...] | None = None
    fluid_edges: tuple[float, ...] | None = None
    carry_forever: bool = False
    death_days: int = 90
    death_clock: str = "icu-admission"
    unknown_units: str = "error"
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    seed: int = 0
    threads: int | None = None
    memory_limit: str = "8GB"
    derived_out: Path | None = field(default=None)

    def __post_init__(self) -> None:
        # YAML and command lines give lists and text.
        for name in ("split", *EDGES):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.derived_out is not None:
            object.__setattr__(self, "derived_out", Path(self.derived_out))
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                known = ", ".join(str(choice) for choice in allowed)
                raise InputError(f"option {name}: {value!r} is unknown; choose one of {known}")
        self._require("max_hours", self.max_hours >= self.step_hours, "at least one step")
        self._require("min_steps", 1 <= self.min_steps <= self.num_steps, "1 to max_hours / step")
        self._require("min_age", self.min_age >= 0, "0 or more years")
        self._require("death_days", self.death_days > 0, "1 or more days")
        self._require("threads", self.threads is None or self.threads > 0, "1 or more")
        self._require("max_urine_ml", self.max_urine_ml > 0, "a volume above 0 mL")
        self._require("split", are_shares(self.split), SHARES)
        for name in EDGES:
            self._require(name, are_edges(getattr(self, name)), RISING)

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise InputError(f"option {name}: {getattr(self, name)!r} does not fit; use {rule}")

    @property
    def num_steps(self) -> int:
        """Most steps of a stay."""
        return int(self.max_hours // self.step_hours)

    @property
    def lead_steps(self) -> int:
        """Steps from the one in which something is recorded to the row that holds it."""
        return int(self.timing == "known-before")

    @property
    def past_steps(self) -> int:
        """Steps before the first row whose measurements may still be held in it."""
        return int(hold_steps(self.step_hours).max()) if self.lead_steps else 0

    @property
    def worker_threads(self) -> int:
        """Threads in effect."""
        return self.threads or usable_cores()

    def to_dict(self) -> JsonDict:
        """JSON-ready form."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("split", *EDGES):
            values[name] = None if values[name] is None else list(values[name])
        values["derived_out"] = str(self.derived_out) if self.derived_out else None
        values["threads"] = self.worker_threads
        return values


# values of several types, checked by `CohortOptions`
def parity_options(revision: str = "before", **changes: Any) -> CohortOptions:
    """The options under which derived tables and SOFA equal mimic-code's DuckDB tables.

    Args:
      revision: of mimic-code: "before" July 2026 (as packaged in m4-infra 0.5.9) or "2026-07".
      **changes: further options.
    """
    base = CohortOptions(
        mimic_code=revision,
        charlson_age_bands=revision,
        age="fractional" if revision == "before" else "years",
        cap_vasopressors=False,
        timing="same-step",
        sofa="rolling-24h",
        sofa_values="mimic-code",
    )
    return replace(base, **changes)
