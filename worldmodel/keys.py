"""Every tag that `jax.random.fold_in` is given, in one place, so that no two streams collide.

A random key is split into streams by folding numbers into it. A key that gets both counted
numbers (patients, steps, samples) and tags needs tags outside the range of what is counted, or
the stream of a tag equals that of some step. Steps and samples lie below `MAX_STEPS`, so
these tags are at least `MAX_STEPS` and at least `MAX_STEPS` apart, which leaves room for
`tag + step`. Patient numbers and stay ids are int32 and not negative, so tags that share a key
with them have the top bit set.

    key                            folded with
    world key (synthetic)          patient number -> patient key
    patient key (synthetic world)  step 0, 1, ... (noise); TRAITS; POLICY, then step; SPLIT;
                                   EFFECT_SAMPLES, then sample; BEHAVIOR + step
    run key (`rollout`)            patient id, then step, then sample, then plan -> branch key
    branch key                     NOISE, POLICY_CHOICE, OUTCOME; nothing is counted here
    episode key (environments)     what its dynamics fold in: the patient key's numbers, or
                                   stay id (as the run key) and START, or START_STATE and
                                   step + 1 (discrete states); besides, UNROLL, then step;
                                   COUNTERFACTUAL + step, then sample
    key of `AutoReset`             EPISODES, then the number of the episode -> episode key
    key of a seed (pipelines)      AGENT_FORECASTS, LLM_FORECASTS; a world key made from the same
                                   seed would share these two with patients of those numbers
"""

from __future__ import annotations

from typing import Final

import numpy as np

MAX_STEPS: Final = 1 << 20  # steps and samples are below

# Patient key of the synthetic world.
TRAITS: Final = np.uint32(1 << 20)  # traits of the patient
POLICY: Final = np.uint32(1 << 21)  # keys of the policy that treats, in `generate`
SPLIT: Final = np.uint32(1 << 22)  # training, validation or test split
EFFECT_SAMPLES: Final = np.uint32(1 << 23)  # noise of `true_action_effects`
BEHAVIOR: Final = np.uint32(1 << 24)  # plus step: key of the behaviour policy of `Info.support`

# Episode key.
UNROLL: Final = np.uint32(0xCE000000)  # keys of the policy in `worldmodel.envs.unroll`
COUNTERFACTUAL: Final = np.uint32(0xCF000000)  # plus step: futures simulated for advantages
START: Final = np.uint32(2**32 - 1)  # stay, row and ensemble member that an episode starts with

# Key of consecutive episodes.
EPISODES: Final = np.uint32(0x5E951500)

# Discrete states: the start state is drawn with the number of step 0, step t with t + 1.
START_STATE: Final = np.uint32(0)

# Branch key: one step of one simulated branch.
NOISE: Final = np.uint32(0)  # noise of the State Model
POLICY_CHOICE: Final = np.uint32(1)  # the policy's key
OUTCOME: Final = np.uint32(2)  # death or survival where it is drawn

# Key of a pipeline's seed.
AGENT_FORECASTS: Final = np.uint32(0x0F0C)  # the simulator's noise
LLM_FORECASTS: Final = np.uint32(0x0F0D)  # the simulator's noise

STEP_TAGS: Final = {
    "TRAITS": TRAITS,
    "POLICY": POLICY,
    "SPLIT": SPLIT,
    "EFFECT_SAMPLES": EFFECT_SAMPLES,
    "BEHAVIOR": BEHAVIOR,
    "EPISODES": EPISODES,
    "UNROLL": UNROLL,
    "COUNTERFACTUAL": COUNTERFACTUAL,
    "START": START,
}
"""Tags of keys that are folded with counted numbers, too."""
