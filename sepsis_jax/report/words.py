"""What tables and figures of a report call things: in words, with units."""

from __future__ import annotations

import re

from worldmodel import schema

FEATURES = {
    "heart_rate": "heart rate", "sysbp": "systolic blood pressure",
    "diabp": "diastolic blood pressure", "meanbp": "mean arterial pressure",
    "resp_rate": "respiratory rate", "spo2": "oxygen saturation", "temp_c": "temperature",
    "fio2": "inspired oxygen", "gcs_eye": "eye response (GCS)",
    "gcs_verbal": "verbal response (GCS)", "gcs_motor": "motor response (GCS)", "alt": "ALT",
    "ast": "AST", "base_excess": "base excess", "bilirubin_total": "total bilirubin",
    "bun": "urea nitrogen", "calcium_free": "ionised calcium", "calcium_total": "total calcium",
    "inr": "INR", "paco2": "arterial CO2 pressure", "pao2": "arterial oxygen pressure",
    "ph": "arterial pH", "platelet": "platelets", "pt": "prothrombin time",
    "ptt": "partial thromboplastin time", "total_co2": "total CO2", "wbc": "white blood cells",
    "output_4hourly": "urine output per step", "sofa": "SOFA score", "urine_24h": "urine of 24 h",
}  # fmt: skip
"""Features whose name in the schema is no word, and scores."""

_UNITS = {feature.name: feature.unit for feature in schema.FEATURES} | {"sofa": "points"}
_NAMES = {
    "policy": "policy", "stage": "stage of training", "group": "kind of patient",
    "dr": "value, DR", "wis": "value, WIS", "wpdis": "value, WPDIS",
    "wpdis_alive": "WPDIS as published", "world_model": "value in the world model",
    "less_clinician": "less clinician, WIS",
    "ess": "effective sample size, stays", "trust": "records can carry WIS",
    "reason": "what speaks against WIS", "adherence": "keeps to both rules, %",
    "unsafe": "under- or overdosing, %", "underdosing": "underdosing, %",
    "overdosing": "overdosing, %", "true": "true value",
    "mortality_auroc": "mortality asked, AUROC", "mortality_auprc": "mortality asked, AUPRC",
    "vasopressor_auroc": "vasopressor need asked, AUROC",
    "vasopressor_auprc": "vasopressor need asked, AUPRC", "valid": "valid calls, %",
    "treated_adherence": "keeps to both rules in its own stays, %",
    "estimator": "estimate", "verdict": "of which", "intervals": "intervals",
    "covered": "hold the truth, %", "covered_low": "at least, %", "covered_high": "at most, %",
    "width": "median width", "rank": "rank correlation", "least_rank": "least rank correlation",
    "seeds": "seeds", "metric": "what is measured", "who": "model", "value": "value",
    "stays": "stays", "mortality": "died within 90 days, %",
    "predicted": "predicted mortality, %", "observed": "observed mortality, %",
    "rl": "after reinforcement learning", "sft": "after patient dynamics",
    "bc": "after demonstrations", "start": "before training",
}  # fmt: skip
"""Columns of the tables; total reward is the unit of every value."""

_POLICIES = {
    "wd3qne": "WD3QNE", "dqn": "DQN", "cql": "CQL", "iql": "IQL", "bcq": "BCQ", "ppo": "PPO",
    "none": "no treatment", "rl": "language model, after reinforcement learning",
    "sft": "language model, after patient dynamics",
    "bc": "language model, after demonstrations", "start": "language model, before training",
    "wait": "wait", "clone": "clinician, cloned from the records",
}  # fmt: skip
_KEYS = FEATURES | {"stay_id": "number"}
_KEY = re.compile(rf"\b({'|'.join(sorted(_KEYS, key=len, reverse=True))})\b")
_AHEAD = re.compile(r"(\w+) MAE, (\d+) steps ahead")


def column(name: str) -> str:
    """Heading of a column, with its unit."""
    return _NAMES.get(name, name.replace("_", " "))


def policy(name: str) -> str:
    """A policy as a table names it; names that people gave stay as they are."""
    return _POLICIES.get(name, name)


def stage(name: str) -> str:
    """A stage of training, with what it was judged without."""
    parts = name.split(", ")
    if parts[1:] == ["simulator none"]:
        parts[1] = "without simulator"
    return ", ".join([_NAMES.get(parts[0], parts[0]), *parts[1:]])


def feature(name: str, *, unit: bool = True) -> str:
    """A feature or score, with its unit."""
    words = FEATURES.get(name, name)
    return f"{words}, {_UNITS[name]}" if unit and name in _UNITS else words


def metric(text: str, step_hours: float = schema.STEP_HOURS) -> str:
    """A row of the table of a world model."""
    ahead = _AHEAD.fullmatch(text)
    if ahead:
        name, steps = ahead.groups()
        unit = _UNITS.get(name, "")
        words = feature(name, unit=False)
        return f"{words} {int(steps) * step_hours:g} h ahead, mean error, {unit}".rstrip(", ")
    return _METRICS.get(text, text)


_METRICS = {
    "state MAE": "next row, mean error, standard deviations",
    "ventilation AUC": "ventilated in the next row, AUROC",
    **{
        f"mortality {short}, {when} row": f"death within 90 days, {words}, {when} row of a stay"
        for when in ("last", "every")
        for short, words in (
            ("AUROC", "AUROC"), ("AUPRC", "AUPRC"), ("calibration error", "calibration error"),
        )
    },
}  # fmt: skip


_EFFECTS = {
    "mortality": "death within 90 days", "reward": "total reward",
    "mortality_supported": "death, treatments that clinicians give",
    "mortality_unsupported": "death, treatments hardly ever given",
    "mortality_shock": "death of patients in shock",
    "chosen_by_model": "the model's choice for each patient", "clinician": "the clinician",
    "best_constant_plan": "the best single treatment for all",
}  # fmt: skip


def effect(name: str) -> str:
    """A quantity or a chooser in the comparison of a world model's futures with the truth."""
    return _EFFECTS.get(name) or feature(name, unit=False)


def plain(text: str) -> str:
    """A sentence in which features have their names in words."""
    return _KEY.sub(lambda found: _KEYS[found.group(1)], text)


def plan(actions: list[int]) -> str:
    """What a plan gives, steps with the same doses together: "vasopressor medium, fluid low"."""
    parts: list[tuple[int, int]] = []
    for action in actions:
        if parts and parts[-1][0] == action:
            parts[-1] = (action, parts[-1][1] + 1)
        else:
            parts.append((action, 1))
    named = [(dose(action), count) for action, count in parts]
    if len(named) == 1:
        return f"{named[0][0]} throughout"
    return ", then ".join(
        f"{text} ({'1 step' if count == 1 else f'{count} steps'})" for text, count in named
    )


def dose(action: int) -> str:
    """A joint action in words: "no treatment", "fluid high", "vasopressor low, fluid low"."""
    levels = [schema.LEVEL_NAMES[level].lower() for level in schema.action_levels(action)]
    given = [
        f"{drug} {level}"
        for drug, level in zip(("vasopressor", "fluid"), levels, strict=True)
        if level != "none"
    ]
    return ", ".join(given) or "no treatment"


def number(value: float, places: int) -> str:
    """With so many decimals; of estimates beyond 1e5, which no record carries, three digits."""
    return f"{value:.{places}f}" if abs(value) < 1e5 else f"{value:.2e}"
