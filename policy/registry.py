"""Registry of policies: names, and how a policy of each name is made or loaded.

A policy is named in one of three ways: a simple policy (`SIMPLE`), which needs nothing; the
clinician, whose probabilities come from records or from the synthetic world; or the folder of a
policy that `policy.checkpoint.save_policy` wrote. `TRAINED` lists the kinds that can be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from policy.base import Policy
from policy.checkpoint import load_policy
from policy.simple import (
    GuidelineRules,
    MaximumTreatment,
    NoTreatment,
    RandomPolicy,
    Titration,
)
from worldmodel.errors import InputError

SIMPLE: dict[str, Callable[[], Policy]] = {
    "random": RandomPolicy,
    "none": NoTreatment,
    "max": MaximumTreatment,
    "guideline": GuidelineRules,
    "titration": Titration,
}
"""Policies without parameters, by name."""

CLINICIAN = "clinician"
"""The policy of the records or of the synthetic world; it has to be cloned to be a `Policy`."""

TRAINED = ("iql", "cql", "wd3qne", "dqn", "bcq", CLINICIAN, "planner", "ppo")
"""Kinds of policies that are trained and saved in folders."""


def names() -> tuple[str, ...]:
    """Names that need no folder: the clinician and the simple policies."""
    return (CLINICIAN, *SIMPLE)


def make(name: str) -> Policy:
    """A simple policy.

    Raises:
      InputError: no simple policy has this name.
    """
    if name not in SIMPLE:
        raise InputError(f"policy {name!r} is not built in; known: {', '.join(names())}")
    return SIMPLE[name]()


def open_policy(name: str | Path, *, clinician: Callable[[], Policy] | None = None) -> Policy:
    """A simple policy, a clone of the clinician, or the policy of a folder.

    Args:
      name: of `names`, or a folder.
      clinician: makes the clone that "clinician" stands for.

    Raises:
      InputError: neither a known name nor a folder with a policy, or there is no clone.
    """
    if name in SIMPLE:
        return make(str(name))
    if name == CLINICIAN:
        if clinician is None:
            raise InputError("policy 'clinician' has to be cloned from records first")
        return clinician()
    return load_policy(name)


def find(text: str, *, source: str = "policy") -> tuple[str, Policy | None]:
    """Name and policy for a known name, a folder, or NAME=FOLDER; None is the clinician.

    Args:
      text: of a user.
      source: named in errors.

    Raises:
      InputError: neither a known name nor a folder with a policy.
    """
    if text == CLINICIAN:
        return text, None
    if text in SIMPLE:
        return text, make(text)
    name, sign, folder = text.partition("=")
    path = Path(folder if sign else text)
    if not path.is_dir():
        raise InputError(
            f"{source} {text!r}: neither {', '.join(names())} nor a folder that "
            "`sepsis-jax policy train` wrote"
        )
    return (name if sign else path.name), load_policy(path)


def find_all(texts: Sequence[str], *, source: str = "policy") -> dict[str, Policy | None]:
    """Policies by name, in the order given; each text as for `find`.

    Raises:
      InputError: there is none, two have the same name, or as `find`.
    """
    if not texts:
        raise InputError(f"{source}: none given; use a folder, {', '.join(names())}")
    found: dict[str, Policy | None] = {}
    for text in texts:
        name, policy = find(text, source=source)
        if name in found:
            raise InputError(f"{source} {text!r}: {name} is already there; write NAME=FOLDER")
        found[name] = policy
    return found
