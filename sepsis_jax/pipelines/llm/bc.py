"""Stage II: a language model learns to propose, simulate, refine and prescribe from dialogues."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from policy.agent.records import RECORDS_FILE, from_record, last_attempts
from policy.agent.tools import SCHEMAS
from policy.serving.tokens import ChatTokens
from policy.train.cache import cached
from policy.train.data import Dialogue, written
from policy.train.metrics import Report
from policy.train.questions import QuestionConfig
from policy.train.rejection import RejectionConfig, accepted
from sepsis_jax.pipelines.llm.clinics import ClinicOptions, open_clinic, open_policy
from sepsis_jax.pipelines.llm.sft import question_dialogues
from sepsis_jax.pipelines.llm.training import SupervisedOptions, learn
from sepsis_jax.pipelines.runs import begin_run, plain
from sepsis_jax.progress import Progress, silent
from worldmodel.configuration import require
from worldmodel.errors import InputError
from worldmodel.files import digest_file

KIND = "sepsis-jax language model, stage II"


@dataclass(frozen=True)
class BCOptions:
    """Stage II.

    Attributes:
      teacher: whose treatment is written out as dialogues: guideline, clinician (cloned from the
        episodes), random, or the folder of a policy, such as a planner.
      patients: that the teacher treats.
      clinic: where.
      rejection: which stays of recorded dialogues are good enough, where these are the teacher.
      replay: questions of stage I that are learned again beside the dialogues, so that they are
        not forgotten; none without episodes.
      training: how.
      seed: of batches.
    """

    teacher: str = "guideline"
    patients: int = 256
    clinic: ClinicOptions = field(default_factory=ClinicOptions)
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    replay: QuestionConfig = field(default_factory=QuestionConfig)
    training: SupervisedOptions = field(default_factory=SupervisedOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda n: n >= 1, "patients")


def run_bc(
    out: Path,
    options: BCOptions,
    *,
    llm: Path,
    model: Path | None = None,
    episodes: Path | None = None,
    records: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> list[Report]:
    """Trains on dialogues of a teacher; writes `out/model` and what `learn` writes.

    Args:
      out: folder to write, or to go on with.
      options: settings.
      llm: Hugging Face folder to start from, such as stage I left it.
      model: world model that the teacher's dialogues ask.
      episodes: recorded stays, for replayed questions and for the "learned" world.
      records: run of an agent (`sepsis-jax agent run`), such as of a strong model behind an
        endpoint; its good stays take the place of the teacher's.
      resume: go on with an earlier run of the same request.
      progress: told of dialogues and updates.

    Raises:
      InputError: inputs that cannot be read, another run in the folder, no stay that is good
        enough, or a training that fails.
    """
    if (model is None) == (records is None):
        raise InputError(
            "--model or --records: name the world model that a teacher asks, or a run of an agent"
        )
    inputs = {"llm": llm, "model": model, "episodes": episodes, "records": records}
    request = {
        "options": plain(options),
        **{name: path and str(path.resolve()) for name, path in inputs.items()},
    }
    begin_run(out, KIND, request, resume=resume)
    progress("dialogues", 0.0)

    def make() -> list[Dialogue]:
        tokens = ChatTokens.load(llm)
        if records is not None:
            found = last_attempts(records / RECORDS_FILE).values()
            stays = accepted([from_record(record) for record in found], options.rejection)
        else:
            assert model is not None
            clinic = open_clinic(options.clinic, model, episodes)
            teacher = open_policy(options.teacher, episodes)
            stays = clinic.demonstrate(teacher, np.arange(options.patients))
        return [one for stay in stays for one in written(stay, tokens, SCHEMAS)]

    source = records / RECORDS_FILE if records is not None else None
    dialogues = list(
        cached(
            out / "cache",
            make,
            tokenizer=llm,
            source="" if source is None else digest_file(source),
            settings=request,
        )
    )
    if episodes is not None:
        dialogues += question_dialogues(
            out / "cache", options.replay, llm=llm, episodes=episodes, seed=options.seed + 1
        )
    return learn(
        out, llm, dialogues, options.training,
        request=request, seed=options.seed, progress=progress,
    )  # fmt: skip
