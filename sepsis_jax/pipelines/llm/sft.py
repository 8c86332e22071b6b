"""Stage I: a language model learns how septic patients fare, from questions about records."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from policy.serving.tokens import ChatTokens
from policy.train.cache import cached
from policy.train.data import Dialogue
from policy.train.metrics import Report
from policy.train.questions import QuestionConfig, as_dialogue, ask
from sepsis_jax.pipelines.llm.training import SupervisedOptions, learn
from sepsis_jax.pipelines.runs import begin_run, plain
from sepsis_jax.progress import Progress, silent
from worldmodel.episode_files import EPISODES_FILE, load_episodes
from worldmodel.files import digest_file

KIND = "sepsis-jax language model, stage I"


@dataclass(frozen=True)
class SFTOptions:
    """Stage I.

    Attributes:
      questions: what is asked of the training split.
      training: how the answers are learned.
      seed: of questions and batches.
    """

    questions: QuestionConfig = field(default_factory=QuestionConfig)
    training: SupervisedOptions = field(default_factory=SupervisedOptions)
    seed: int = 0


def run_sft(
    out: Path,
    options: SFTOptions,
    *,
    llm: Path,
    episodes: Path,
    resume: bool = False,
    progress: Progress = silent,
) -> list[Report]:
    """Trains on questions; writes `out/model` and what `learn` writes.

    Args:
      out: folder to write, or to go on with.
      options: settings.
      llm: Hugging Face folder to start from.
      episodes: folder of recorded stays.
      resume: go on with an earlier run of the same request.
      progress: told of questions and updates.

    Raises:
      InputError: inputs that cannot be read, another run in the folder, or a training that fails.
    """
    request = {
        "options": plain(options),
        "llm": str(llm.resolve()),
        "episodes": str(episodes.resolve()),
    }
    begin_run(out, KIND, request, resume=resume)
    progress("questions", 0.0)
    dialogues = question_dialogues(
        out / "cache", options.questions, llm=llm, episodes=episodes, seed=options.seed
    )
    return learn(
        out, llm, dialogues, options.training,
        request=request, seed=options.seed, progress=progress,
    )  # fmt: skip


def question_dialogues(
    cache: Path, questions: QuestionConfig, *, llm: Path, episodes: Path, seed: int
) -> list[Dialogue]:
    """Questions of the training split as sequences of a model's tokens, from the cache."""

    def make() -> list[Dialogue]:
        tokens = ChatTokens.load(llm)
        recorded = load_episodes(episodes).of_split("train")
        return [as_dialogue(question, tokens) for question in ask(recorded, questions, seed=seed)]

    found = cached(
        cache, make, tokenizer=llm, source=digest_file(episodes / EPISODES_FILE),
        settings=plain(questions) | {"seed": seed},
    )  # fmt: skip
    return list(found)
