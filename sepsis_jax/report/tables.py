"""Rows of the tables that commands print and reports show."""

from __future__ import annotations

from typing import Any

MODEL_NAMES = {"model": "world model", "last_value": "last value stays", "linear": "linear model"}
OUTCOME_NAMES = MODEL_NAMES | {"last_value": "SOFA alone"}
STATE_COLUMNS = ("", "MAE", "MAE, imputed too", "NLL", "CRPS", "90% coverage", "ventilation AUC")
OUTCOME_COLUMNS = ("", "AUROC", "AUPRC", "Brier", "ECE", "deaths")


def state_rows(metrics: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The State Model beside its baselines, in the columns of `STATE_COLUMNS`."""
    keys = ("mae", "mae_all", "nll", "crps", "coverage", "ventilation_auc")
    return [
        (MODEL_NAMES[name], *(row[key] for key in keys)) for name, row in metrics["state"].items()
    ]


def outcome_rows(metrics: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The Outcome Model beside its baseline, in the columns of `OUTCOME_COLUMNS`."""
    keys = ("auroc", "auprc", "brier", "ece", "prevalence")
    return [
        (f"{OUTCOME_NAMES[name]}, {when}", *(row[key] for key in keys))
        for part, when in (("outcome", "last step"), ("outcome_every_step", "every step"))
        for name, row in metrics[part].items()
    ]
