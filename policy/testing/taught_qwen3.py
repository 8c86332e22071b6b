"""A tiny Qwen3 that holds the agent's dialogue: for tests and demos, without a network.

It has learned the form of the dialogue, in a minute or two on one core, and nothing of medicine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from policy.agent.dialogue import Stay
from policy.agent.forecast import ForecastConfig, Forecaster
from policy.agent.prompts import Prompts
from policy.qwen3.model import Qwen3
from policy.qwen3.weights import load, save_hf
from policy.serving.tokens import ChatTokens
from policy.simple import GuidelineRules
from policy.testing.tiny_qwen3 import make_tiny
from policy.train.data.packing import Dialogue, batches, cut, pack, written
from policy.train.data.qa_sampling import Question, as_dialogue
from policy.train.episodes import DemonstrationConfig, EpisodeRunner
from policy.train.loop.learner import Learner, cast
from policy.train.loop.metrics import Report
from policy.train.loop.optimizer import LearnerConfig
from policy.train.losses import cross_entropy
from worldmodel.envs.env import SepsisEnv
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.observation import PolicyFn
from worldmodel.scaling import published_scaler
from worldmodel.synthetic import Config

TEMPLATES = "compact"


@dataclass(frozen=True)
class TrainingPhase:
    """Settings of training on rows of one length."""

    length: int  # tokens per row
    rows: int  # per update
    updates: int
    learning_rate: float


PHASES = (
    TrainingPhase(length=352, rows=6, updates=60, learning_rate=4e-3),
    TrainingPhase(length=1056, rows=2, updates=60, learning_rate=3e-3),
    TrainingPhase(length=2112, rows=1, updates=40, learning_rate=2e-3),
)
"""For stays of about three decisions.

Short rows are cheap and teach the form of a call; long rows teach dialogues of many turns.
"""

WHOLE_STAYS = (
    *PHASES,
    TrainingPhase(length=4224, rows=1, updates=12, learning_rate=1.5e-3),
    TrainingPhase(length=6592, rows=1, updates=4, learning_rate=1e-3),
)
"""Towards stays of twenty decisions, which they do not reach reliably; twice as long."""

PLAIN = DemonstrationConfig(
    shuffle=False, second_round=0.0, without_simulator=0.0, exploration=0.0, errors=0.0
)
"""Every decision simulates once and prescribes what was chosen."""

# whole and real numbers, as the arguments of `make_tiny`
_SIZE: dict[str, Any] = {
    "layers": 1,
    "hidden": 64,
    "heads": 2,
    "kv_heads": 1,
    "rope_theta": 1e3,  # few dimensions that turn less than once in a stay
    "initializer_range": 0.08,
}


@dataclass(frozen=True)
class TinyOptions:
    """A tiny Qwen3.

    Attributes:
      layers, hidden, heads, kv_heads, vocab, rope_theta, initializer_range: as for `make_tiny`.
      seed: of the weights.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 2
    kv_heads: int = 1
    vocab: int = 1024
    rope_theta: float = 1e3
    initializer_range: float = 0.08
    seed: int = 0


def make_trainable(
    path: str | Path, options: TinyOptions, stays: Sequence[Stay], questions: Sequence[Question]
) -> Path:
    """Writes a tiny Qwen3 that has learned nothing, with a tokenizer for what it is to learn.

    Args:
      path: folder to make.
      options: the model.
      stays: dialogues such as it will hold; their phrases become tokens.
      questions: such as it will be asked, likewise.
    """
    with tempfile.TemporaryDirectory() as folder:
        any_tokens = ChatTokens.load(make_tiny(folder, brief=True))
        dialogues = [one for stay in stays for one in written(stay, any_tokens)]
        dialogues += [as_dialogue(question, any_tokens) for question in questions]
        texts = [any_tokens.text([*one.ids.tolist(), any_tokens.end_id]) for one in dialogues]
    return make_tiny(path, texts=texts, brief=True, **asdict(options))


def tiny_runner(*, max_steps: int | None = None, seed: int = 0) -> EpisodeRunner:
    """A runner with synthetic patients and an untrained world model.

    Args:
      max_steps: decisions per stay at most.
      seed: of the patients.
    """
    shape = ModelConfig(variant="reference", hidden=16, layers=1, embed=8, head=8)
    world_model = init_world_model(jax.random.key(0), published_scaler(), shape)
    return EpisodeRunner(
        env=SepsisEnv.synthetic(config=Config(past=Forecaster.past), max_steps=max_steps),
        forecaster=Forecaster(world_model, jax.random.key(1), ForecastConfig(samples=2)),
        prompts=Prompts(TEMPLATES),
        seed=seed,
    )


def taught_tiny(
    path: str | Path,
    *,
    seed: int = 0,
    patients: int = 32,
    phases: tuple[TrainingPhase, ...] = PHASES,
    demonstrator: PolicyFn | None = None,
    report: Callable[[Report], None] | None = None,
    dtype: DTypeLike = "float32",
    **size: Any,
) -> Path:
    """Writes a tiny Qwen3 folder whose replies are valid tool calls in the compact dialogue.

    Args:
      path: folder to make; an older model there is replaced.
      seed: of the weights, the patients and the order of learning.
      patients: number of synthetic patients that the demonstrator treats.
      phases: of the training, in order, such as `PHASES` or `WHOLE_STAYS`.
      demonstrator: policy that is imitated; `GuidelineRules` if not given.
      report: called as training goes on.
      dtype: of the weights as written; they are trained in float32.
      size: of the model, as for `make_tiny`.

    Raises:
      InputError: as `save_hf`, or a phase's rows are too short for the dialogue.
    """
    runner, policy = tiny_runner(seed=seed), demonstrator or GuidelineRules()
    stays = runner.demonstrate(policy, range(patients), PLAIN)
    with tempfile.TemporaryDirectory() as folder:
        untaught = make_tiny(Path(folder) / "untaught", seed=seed, **(_SIZE | size))
        tokens = ChatTokens.load(untaught)
        dialogues = [one for stay in stays for one in written(stay, tokens)]
        model = load(untaught)
        for phase in phases:
            model = _taught(model, dialogues, phase, seed, report)
        return save_hf(cast(model, dtype), path, source=untaught)


def _taught(
    model: Qwen3,
    dialogues: list[Dialogue],
    phase: TrainingPhase,
    seed: int,
    report: Callable[[Report], None] | None,
) -> Qwen3:
    parts = [part for one in dialogues for part in _parts(one, phase.length)]
    config = LearnerConfig(
        max_steps=phase.updates,
        learning_rate=phase.learning_rate,
        warmup_steps=phase.updates // 6,
        logging_steps=min(20, phase.updates),
    )
    learner = Learner(model, cross_entropy, config)
    rows = pack(parts, phase.length, seed=seed)
    learner.run(batches(rows, phase.rows, seed=seed), report=report)
    return learner.model()


def _parts(dialogue: Dialogue, length: int) -> list[Dialogue]:
    """Parts that fit rows; where the first turn, with the tools' schemas, does not, without it."""
    first = int(dialogue.ends()[0])
    start = first if first > length else 0
    return cut(dialogue[start:], length, rest=True) if start < len(dialogue) else []
