"""Cards beside artefacts: what they are made of, what they are for, and what not.

A card is a README.md with the front matter that the Hugging Face hub reads. It is made from the
artefact's own manifest, so that equal runs have equal cards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

CARD = "README.md"

# JSON of any structure
Manifest = Mapping[str, Any]


class Terms(NamedTuple):
    """What may be done with data."""

    source: str  # in words
    license: str | None  # URL, where it is the same for everybody
    note: str
    tag: str = "other"  # license in a card's front matter


_OWN = Terms(
    "records of a hospital",
    None,
    "The terms of the records hold for all that is made of them. Ask their owner before anything "
    "is shared, figures of few patients included.",
)
_TERMS = {
    "synthetic": Terms(
        "the synthetic world of sepsis-jax",
        "https://creativecommons.org/publicdomain/zero/1.0/",
        "Nobody's records are in it: it may be shared.",
        "cc0-1.0",
    ),
    "mimic-iv": Terms(
        "MIMIC-IV",
        "https://physionet.org/about/licenses/physionet-credentialed-health-data-license-150/",
        "The data use agreement of MIMIC forbids to share the records and what tells of single "
        "patients. Models and derived data are shared through PhysioNet, under the same agreement.",
    ),
    "meds": _OWN,
    "own table": _OWN,
}
_WARNING = """\
> Research software. **Not for clinical use**: nothing here has been validated for, or may be used
> in, the care of a patient."""
_RECORDED = (
    "Values between measurements are carried forward or imputed; masks tell which were measured. "
    "Treatments were chosen by clinicians who knew more than is recorded."
)
_SIMULATED = "The patients are simulated. What holds for them need not hold for people."
_DATA_USE = (
    "Research on models and policies in simulation. Not to draw conclusions about patients, and "
    "not to find out who they are."
)
_MODEL_USE = (
    "Simulated futures for research, and environments to learn policies in. Not for decisions "
    "about people."
)
_MODEL_LIMITS = (
    "Trained on what clinicians did, it extrapolates where they hardly ever go. Causes that are "
    "not recorded are not adjusted for. Other hospitals, times and steps need a model of their own."
)
_POLICY_USE = (
    "Comparisons in simulation and off-policy evaluation (`sepsis-jax ope`), which tells what it "
    "may be worth, with intervals and diagnostics. Not to treat anybody."
)
_POLICY_LIMITS = (
    "What it learned of treatments that clinicians hardly ever give is extrapolated. A better "
    "value in a world model is no evidence that patients would fare better."
)


def terms_of(source: object) -> Terms:
    """Terms of the data of a cohort, by the `source` of its manifest."""
    return _TERMS.get(str(source), _OWN)


def data_card(manifest: Manifest) -> str:
    """The card of a folder of episodes, from its manifest."""
    terms = terms_of(manifest.get("source"))
    synthetic = manifest.get("source") == "synthetic"
    return _card(
        "Stays of patients with sepsis",
        {"license": terms.tag, "pretty_name": "Sepsis stays", "tags": ["sepsis", "icu"]},
        Contents=(
            f"{manifest['stays']} stays with {manifest['rows']} steps of "
            f"{manifest['step_hours']:g} h, from {terms.source}. `episodes.parquet` has a row per "
            "stay and step: vital signs, laboratory values, treatments and outcome. Fields and "
            "units are in `croissant.json`, how the cohort was made in `manifest.json`."
        ),
        Intended_use=_DATA_USE,
        Limits=_SIMULATED if synthetic else _RECORDED,
        Terms=terms.note,
    )


def world_model_card(manifest: Manifest) -> str:
    """The card of a world model, from its manifest; with figures where it was evaluated."""
    data = manifest.get("episodes") or {}
    terms = terms_of(data.get("source"))
    config, members = manifest["config"], manifest["members"]
    training = manifest.get("training")
    return _card(
        "World model of sepsis",
        {
            "license": terms.tag,
            "library_name": "sepsis-jax",
            "tags": ["sepsis", "world-model", "jax"],
        },
        Model=(
            f"Predicts a patient's state {manifest['step_hours']:g} h ahead under a treatment, and "
            f"death within 90 days. Variant `{config['variant']}`, width {config['hidden']}, "
            f"{members} member{'' if members == 1 else 's'}."
        ),
        Data=_trained_on(data, terms),
        Training=f"Seed {training['seed']}; settings are in the manifest." if training else "",
        Figures=_figures(manifest.get("metrics")),
        Intended_use=_MODEL_USE,
        Limits=_MODEL_LIMITS,
        Terms=terms.note,
    )


def policy_card(manifest: Manifest) -> str:
    """The card of a policy, from its manifest."""
    terms = terms_of(manifest.get("source"))
    sha256 = (manifest.get("inputs") or {}).get("episodes")
    seed = (manifest.get("config") or {}).get("seed")
    report = manifest.get("report") or manifest.get("last") or {}
    figures = [(name, value) for name, value in report.items() if isinstance(value, int | float)]
    return _card(
        f"Policy of sepsis treatment: {manifest['method']}",
        {
            "license": terms.tag,
            "library_name": "sepsis-jax",
            "tags": ["sepsis", "reinforcement-learning", "jax"],
        },
        Policy=(
            "Chooses one of 25 pairs of vasopressor and fluid level in every step. Settings are in "
            "`policy.json`."
        ),
        Data=_trained_on({"source": manifest.get("source"), "sha256": sha256}, terms),
        Training="" if seed is None else f"Seed {seed}.",
        Figures=_table(("at the end of training", "value"), figures),
        Intended_use=_POLICY_USE,
        Limits=_POLICY_LIMITS,
        Terms=terms.note,
    )


def _trained_on(data: Mapping[str, object], terms: Terms) -> str:
    if not data.get("sha256"):
        return "Not recorded."
    stays = "" if data.get("stays") is None else f"{data['stays']} stays of "
    return f"From {stays}{terms.source}; SHA-256 of the episodes: `{data['sha256']}`."


def _figures(metrics: Manifest | None) -> str:
    if not metrics:
        return ""
    parts = [f"{metrics['stays']} stays of the split `{metrics['split']}`, beside two baselines."]
    for name, title in (("state", "Next state (z-scores)"), ("outcome", "Death within 90 days")):
        columns = list(metrics[name]["model"])
        rows = [(who, *map(row.get, columns)) for who, row in metrics[name].items()]
        parts += [f"{title}:", _table(("", *columns), rows)]
    return "\n\n".join(parts)


def _table(head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _card(title: str, front: Mapping[str, object], **sections: str) -> str:
    head = "\n".join(f"{name}: {json.dumps(value)}" for name, value in front.items())
    body = "\n\n".join(
        f"## {name.replace('_', ' ')}\n\n{text}" for name, text in sections.items() if text
    )
    return f"---\n{head}\n---\n\n# {title}\n\n{_WARNING}\n\n{body}\n"
