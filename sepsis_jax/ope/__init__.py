"""Off-policy evaluation: the value of a policy, estimated from recorded stays.

    table = evaluate(data, {"policy": probs}, key=jax.random.key(0))

Every estimate comes with an interval, diagnostics and a verdict. Conventions, formulas and advice
from synthetic data with known values: docs/ope.md.
"""

from sepsis_jax.ope.data import InputPolicy, OPEData, check, from_episodes
from sepsis_jax.ope.diagnostics import Limits, diagnose
from sepsis_jax.ope.estimated_clinician import ClinicianFit
from sepsis_jax.ope.estimators import (
    ESTIMATORS,
    Batch,
    Shrinkage,
    Values,
    estimate,
    make_batch,
)
from sepsis_jax.ope.evaluate import evaluate
from sepsis_jax.ope.fitted import Fitted, fit
from sepsis_jax.ope.fqe import state_features
from sepsis_jax.ope.weights import Clip, weigh
from worldmodel.clinical.reward import episode_rewards as rewards

__all__ = [
    "ESTIMATORS",
    "Batch",
    "ClinicianFit",
    "Clip",
    "Fitted",
    "InputPolicy",
    "Limits",
    "OPEData",
    "Shrinkage",
    "Values",
    "check",
    "diagnose",
    "estimate",
    "evaluate",
    "fit",
    "from_episodes",
    "make_batch",
    "rewards",
    "state_features",
    "weigh",
]
