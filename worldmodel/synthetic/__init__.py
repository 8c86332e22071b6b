"""The synthetic world: a mechanistic septic patient in which the truth is known.

    key = jax.random.key(0)
    episodes, truth = generate(key, 10_000)
    same_patients, _ = counterfactual(truth, plans)
    true_value(key, policy, 100_000).interval

Research software, not a validated physiological model and never for clinical use.
"""

from worldmodel.observation import Observation, ObservationHistory, PolicyFn
from worldmodel.synthetic.clinician import (
    maximum_treatment,
    no_treatment,
    random_policy,
    titration,
)
from worldmodel.synthetic.generate import (
    Truth,
    generate,
    marginals,
    recorded_statistics,
    stay_statistics,
)
from worldmodel.synthetic.patients import patient_key, patient_keys
from worldmodel.synthetic.simulate import FOLLOW_POLICY
from worldmodel.synthetic.truth import (
    ActionEffects,
    PolicyValue,
    counterfactual,
    true_action_effects,
    true_value,
)
from worldmodel.synthetic.world import Config, Params, State, Transition, reset, step

__all__ = [
    "FOLLOW_POLICY",
    "ActionEffects",
    "Config",
    "Observation",
    "ObservationHistory",
    "Params",
    "PolicyFn",
    "PolicyValue",
    "State",
    "Transition",
    "Truth",
    "counterfactual",
    "generate",
    "marginals",
    "maximum_treatment",
    "no_treatment",
    "patient_key",
    "patient_keys",
    "random_policy",
    "recorded_statistics",
    "reset",
    "stay_statistics",
    "step",
    "titration",
    "true_action_effects",
    "true_value",
]
