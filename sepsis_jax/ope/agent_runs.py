"""Action probabilities of a language model, from an agent's run over recorded states.

How they enter the weights is decided here, once:

- The policy is the whole agent: what it asks the simulator and says before it prescribes is drawn
  once per recorded state, and the probabilities are those of the prescription that follows. They
  are unbiased for the policy with that draw averaged out, and so is a product of their ratios.
- Where all 25 calls were scored (`probabilities` of the run), they are brought from temperature 1
  to the temperature of the run, level by level as the sampler draws them.
- Where they were not (an endpoint that has no token log-probabilities), the drawn prescription
  has probability 1. That is unbiased as well, with a far larger variance.
- A state in which the model did not get a valid prescription out, and all later ones of that stay,
  count as no treatment: nothing is given in the model's name, and nothing is made up.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from policy.agent.records import RECORDS_FILE, last_attempts
from sepsis_jax.runs import MANIFEST
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import read_json


class RunProbabilities(NamedTuple):
    """What an agent's run says of N recorded stays."""

    probs: np.ndarray  # [N, T, 25] float32
    drawn: float  # share of steps whose probabilities are a drawn prescription
    failed: float  # share of steps without a prescription, as no treatment


def is_run(folder: Path) -> bool:
    """Whether a folder holds an agent's run."""
    return (folder / RECORDS_FILE).exists()


def read_run(folder: Path, episodes: Episodes) -> RunProbabilities:
    """Probabilities of an agent in every recorded state, from `agent run` with `keep_to_record`.

    Args:
      folder: of the run.
      episodes: N recorded stays, each of which the run must have begun.

    Raises:
      InputError: a run over other states than recorded ones, or one that lacks a stay.
    """
    options = read_json(folder / MANIFEST).get("request", {}).get("options", {})
    if not options.get("keep_to_record"):
        raise InputError(
            f"{folder}: the agent was not asked in recorded states; run it with --episodes and "
            "--set keep_to_record=true --set probabilities=true --set dialogue.memory=decision"
        )
    temperature = float(options["dialogue"]["sampling"]["temperature"])
    records = last_attempts(folder / RECORDS_FILE)
    valid, length = np.asarray(episodes.valid), np.asarray(episodes.length)
    probs = np.zeros((*valid.shape, schema.NUM_ACTIONS), np.float32)
    probs[..., 0] = 1.0
    drawn = said = 0
    for row, stay in enumerate(np.asarray(episodes.stay_id).tolist()):
        if stay not in records:
            raise InputError(f"{folder}: stay {stay} is missing; resume the run, over all stays")
        for decision in records[stay]["decisions"]:
            step = int(decision["step"])
            if step >= length[row]:
                raise InputError(f"{folder}: stay {stay} has no step {step}; another cohort?")
            found = decision["probabilities"]
            if found is None:
                probs[row, step] = np.eye(schema.NUM_ACTIONS)[decision["action"]]
                drawn += 1
            else:
                probs[row, step] = at_temperature(np.asarray(found), temperature)
            said += 1
    total = int(valid.sum())
    return RunProbabilities(probs, drawn / total, 1 - said / total)


def at_temperature(
    probs: Float[np.ndarray, "*b 25"], temperature: float
) -> Float[np.ndarray, "*b 25"]:
    """Probabilities of actions drawn level by level at a temperature, from those at 1.

    p_T(v, f) is proportional to p(v)^(1/T), times p(f | v)^(1/T) normalised over f; at 0 all is on
    the likeliest vasopressor level and the likeliest fluid level with it.

    Args:
      probs: [..., 25] at temperature 1.
      temperature: 0 or more.
    """
    shape = (*probs.shape[:-1], schema.NUM_LEVELS, schema.NUM_LEVELS)
    table = np.asarray(probs, np.float64).reshape(shape)
    vasopressor = table.sum(-1)
    fluid = table / np.maximum(vasopressor[..., None], np.finfo(np.float64).tiny)

    def drawn(share: np.ndarray) -> np.ndarray:
        if temperature == 0:
            found: np.ndarray = np.eye(schema.NUM_LEVELS)[share.argmax(-1)]
            return found
        logits = np.log(np.maximum(share, np.finfo(np.float64).tiny)) / temperature
        weights = np.exp(logits - logits.max(-1, keepdims=True)) * (share > 0)
        found = weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
        return found

    result: np.ndarray = (drawn(vasopressor)[..., None] * drawn(fluid)).reshape(probs.shape)
    return result
