"""Where the stages' dialogues are held."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import jax

from policy.agent.dialogue import DECISION, DialogueConfig
from policy.agent.forecast import ForecastConfig, Forecaster
from policy.agent.prompts import Prompts
from policy.base import Policy
from policy.checkpoint import load_policy
from policy.qwen3.config import load_stop_ids
from policy.qwen3.model import Qwen3
from policy.qwen3.sampler import bucket
from policy.serving.batching import Lockstep
from policy.serving.embedded import EmbeddedGenerator
from policy.train.clinic import Clinic
from sepsis_jax.ope.policies import SIMPLE
from sepsis_jax.pipelines.policies import CLINICIAN, CloneConfig, fit_clone
from worldmodel.configuration import require
from worldmodel.envs.env import SepsisEnv
from worldmodel.episode_files import load_episodes
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import load_world_model
from worldmodel.synthetic import Config

SYNTHETIC, LEARNED = WORLDS = ("synthetic", "learned")
_FORECASTS = 0x0F0D  # sets the simulator's noise apart from the patients'


@dataclass(frozen=True)
class ClinicOptions:
    """A clinic.

    Attributes:
      world: where patients live: "synthetic", or "learned", which is in the world model, from
        recorded stays on.
      max_steps: decisions per stay at most.
      templates: as for the agent.
      intervals: tell 90% intervals.
      concurrency: stays in treatment at the same time.
      forecast: how simulations are answered.
      dialogue: bounds of dialogues, and how replies are drawn.
      seed: of patients.
    """

    world: str = SYNTHETIC
    max_steps: int | None = None
    templates: str = "full"
    intervals: bool = True
    concurrency: int = 64
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    dialogue: DialogueConfig = field(default_factory=lambda: DialogueConfig(memory=DECISION))
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, f"one of {WORLDS}", WORLDS.__contains__, "world")
        require(self, "at least 1", lambda n: n >= 1, "concurrency")


def open_clinic(options: ClinicOptions, model: Path, episodes: Path | None) -> Clinic:
    """A clinic with a world model to ask.

    Args:
      options: settings.
      model: world model; answers simulations.
      episodes: recorded stays, for the "learned" world; its training split is treated.

    Raises:
      InputError: an input cannot be read, or stays are missing.
    """
    world_model = load_world_model(model)
    key = jax.random.fold_in(jax.random.key(options.seed), _FORECASTS)
    if options.world == SYNTHETIC:
        env = SepsisEnv.synthetic(config=Config(past=Forecaster.past), max_steps=options.max_steps)
    else:
        if episodes is None:
            raise InputError("--episodes: patients of the learned world start from recorded stays")
        env = SepsisEnv.learned(
            world_model, load_episodes(episodes).of_split("train"), past=Forecaster.past,
            mortality_each_step=False, max_steps=options.max_steps,
        )  # fmt: skip
    return Clinic(
        env=env,
        forecaster=Forecaster(world_model, key, options.forecast),
        prompts=Prompts(
            options.templates,
            hours=world_model.step_hours,
            max_simulations=options.dialogue.max_simulations,
            intervals=options.intervals,
        ),
        dialogue=options.dialogue,
        seed=options.seed,
        concurrency=options.concurrency,
    )


def open_generator(
    model: Qwen3, folder: Path, options: ClinicOptions, lockstep: Lockstep
) -> EmbeddedGenerator:
    """The sampler of this process, for all dialogues that a clinic holds at a time.

    Batches are filled up to an eighth of these, not to all: near the end of a batch of stays few
    dialogues are left, and an idle row costs as much as a busy one.

    Args:
      model: the model.
      folder: that it came from, and whose stop tokens are its.
      options: of the clinic.
      lockstep: shared with the ward.
    """
    rows = bucket(options.concurrency)
    return EmbeddedGenerator(
        model, stop_ids=load_stop_ids(folder), name=str(folder),
        min_batch=max(rows // 8, 1), max_batch=rows, lockstep=lockstep,
    )  # fmt: skip


def judging(clinic: Clinic, options: ClinicOptions, *, seed: int) -> Clinic:
    """The same clinic with fresh patients of the synthetic world, whose outcomes are the truth."""
    env = SepsisEnv.synthetic(config=Config(past=Forecaster.past), max_steps=options.max_steps)
    return replace(clinic, env=env, seed=seed)


def open_policy(name: str, episodes: Path | None = None) -> Policy:
    """A built-in policy such as guideline, the clinician of records, or the policy of a folder.

    Args:
      name: of `SIMPLE`; "clinician", which is cloned from the episodes first; or a folder.
      episodes: recorded stays.

    Raises:
      InputError: none of these, or the clinician's records are missing.
    """
    if name in SIMPLE:
        return SIMPLE[name]()
    if name == CLINICIAN:
        if episodes is None:
            raise InputError("--episodes: the clinician is cloned from records; name some")
        return fit_clone(load_episodes(episodes), CloneConfig()).policy
    return load_policy(name)
