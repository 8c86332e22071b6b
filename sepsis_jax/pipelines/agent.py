"""A language model treats simulated patients, stay by stay, and resumes after an interruption."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from policy.agent.dialogue import DEATH, DECISION, RELEASE, DialogueConfig, Stay, treat_all
from policy.agent.env_pool import EnvPool, reset_batch
from policy.agent.forecast import ForecastConfig, Forecaster
from policy.agent.prompts import Prompts
from policy.agent.records import RECORDS_FILE, Records, last_attempts, summarize, to_record
from policy.agent.reference import AGENT_MODES, CORRECTED, Quirks, learned_env, make_forecaster
from policy.agent.tools import ActionScorer
from policy.agent.transcript import actions_text
from policy.checkpoint import load_policy
from policy.serving.backend import Backend, BackendError
from policy.serving.tokens import ChatTokens, TokenBackend
from sepsis_jax.runs import JsonDict, Progress, plain, run_folder, silent
from worldmodel import keys, schema
from worldmodel.clinical.reward import episode_rewards
from worldmodel.configuration import read_yaml, require
from worldmodel.envs.env import SepsisEnv
from worldmodel.episode_files import load_episodes_for
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import write_json
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.world_model import WorldModel
from worldmodel.resources import require_memory
from worldmodel.synthetic import Config, patient_keys

T = TypeVar("T")

EMBEDDED, VLLM, OPENAI, SCRIPTED = KINDS = ("embedded", "vllm", "openai", "scripted")


@dataclass(frozen=True)
class BackendOptions:
    """Which model is asked, and where it runs.

    Attributes:
      kind: "embedded" (a Qwen3 folder in this process), "vllm" (a server of such a folder, token
        by token), "openai" (any OpenAI-compatible endpoint, message by message), or "scripted"
        (draws treatments and reads nothing).
      llm: folder of the model (for vllm of its tokenizer), or the endpoint's name of it.
      url: of the endpoint, such as http://127.0.0.1:8000/v1.
      key_variable: environment variable that holds the endpoint's key; none is sent without it.
      key_file: file that holds the key, where the variable is not set.
      served_name: the server's name of the model, where it is not the folder's name.
      reasoning: the endpoint takes neither temperature, top_p nor seed, as o3.
      extra: further parameters of the endpoint's requests, each NAME=VALUE with YAML values.
      enable_thinking: switch of the model's chat template; None leaves it as the template has it.
    """

    kind: str = EMBEDDED
    llm: str | None = None
    url: str | None = None
    key_variable: str | None = None
    key_file: Path | None = None
    served_name: str | None = None
    reasoning: bool = False
    extra: tuple[str, ...] = field(default=())
    enable_thinking: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"backend: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.kind != SCRIPTED and not self.llm:
            raise InputError("llm: name the model's folder, or its name at the endpoint")
        if self.kind in (VLLM, OPENAI) and not self.url:
            raise InputError(f"url: the {self.kind} backend needs one, as http://127.0.0.1:8000/v1")
        if self.kind == SCRIPTED and self.enable_thinking is not None:
            raise InputError("enable_thinking: the scripted backend has no thoughts; leave it out")


def open_backend(options: BackendOptions, *, kept: int = 0) -> Backend:
    """A backend, ready to be asked; of a server it is checked first what it gives.

    Not within a running event loop.

    Args:
      options: which one.
      kept: dialogues at a time whose keys and values an embedded model keeps.

    Raises:
      InputError: a folder that cannot be read, a key that is missing, a server that cannot be
        reached, or a vLLM server whose log-probabilities are not those of the distribution that it
        draws from.
    """
    if options.kind == SCRIPTED:
        from policy.agent.scripted import ScriptedBackend, simulate_and_prescribe

        return ScriptedBackend(simulate_and_prescribe)
    llm = str(options.llm)
    if options.kind == EMBEDDED:
        from policy.qwen3.prefix_cache import rows_kept
        from policy.serving.embedded import EmbeddedGenerator

        prefix_rows = rows_kept(kept) if kept else 0
        return TokenBackend(
            EmbeddedGenerator.from_folder(llm, prefix_rows=prefix_rows), load_tokens(options)
        )
    from policy.serving.vllm.check import check_server, require_logprobs

    server = endpoint(options)
    if options.kind == VLLM:
        from policy.serving.vllm.generator import VLLMGenerator

        _checked(require_logprobs(server))
        return TokenBackend(VLLMGenerator(server), load_tokens(options))
    from policy.serving.openai import REASONING_MODELS, ChatOptions, OpenAIBackend

    omit = REASONING_MODELS if options.reasoning else frozenset()
    extra = _parameters(options.extra)  # before the server, for which minutes may be waited
    chat = ChatOptions(
        vllm=_checked(check_server(server)),
        omit=omit,
        extra=extra,
        enable_thinking=options.enable_thinking,
    )
    return OpenAIBackend(server, chat)


def _checked(asked: Coroutine[None, None, T]) -> T:
    """What a check of a server says."""
    try:
        return asyncio.run(asked)
    except BackendError as error:
        raise InputError(f"{error}; start the server, or name another in url") from None


def load_tokens(options: BackendOptions) -> ChatTokens:
    """The tokenizer of an embedded or vllm backend."""
    return ChatTokens.load(str(options.llm), enable_thinking=options.enable_thinking)


# the endpoint's class is imported only where it is used
def endpoint(options: BackendOptions) -> Any:
    """The endpoint of a vllm or openai backend, as `policy.serving.client.Endpoint`."""
    from policy.serving.client import Endpoint

    llm = Path(str(options.llm))
    name = options.served_name or (llm.resolve().name if options.kind == VLLM else str(options.llm))
    return Endpoint(
        url=str(options.url),
        model=name,
        key_variable=options.key_variable,
        key_file=options.key_file,
    )


def _parameters(texts: tuple[str, ...]) -> JsonDict:
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise InputError(f"extra: {text!r} is not NAME=VALUE")
        found[name] = read_yaml(value)
    return found


KIND = "sepsis-jax agent run"
SUMMARY = "summary.json"
SYNTHETIC_PATIENTS = 32  # if not told how many
_PATIENT_BYTES = 16_384  # of a patient in the pool


@dataclass(frozen=True)
class AgentOptions:
    """What is asked of an agent.

    Attributes:
      patients: synthetic patients, or at most so many recorded stays; None takes all of these.
      split: of recorded stays: train, validation, test or all.
      max_steps: decisions per stay at most; None for no limit.
      mode: "corrected", or "reference" for all quirks of SepsisAgent's published inference.
      quirks: single ones, on or off whatever the mode.
      follow_record: recorded rows follow as long as the agent gives what was given.
      keep_to_record: give what was given, whatever the agent prescribes, so that it is asked in
        every recorded state; its probabilities can then be evaluated off-policy.
      templates: "full", "compact", or a folder of templates.
      intervals: tell the agent 90% intervals.
      support_limit: probability under the clinicians' policy below which a simulated treatment
        comes with a warning.
      concurrency: stays in treatment at the same time.
      attempts: at a stay that fails.
      prefix_caching: an embedded model keeps the keys and values of the last turn of all dialogues
        in treatment and reads only what is new; takes the memory of twice as many contexts.
      probabilities: note those of all 25 prescriptions at each decision; needs a backend that
        works token by token (embedded or vllm).
      seed: of patients, noise and replies.
      forecast: how simulations are answered.
      dialogue: bounds of a dialogue, and how replies are drawn.
    """

    patients: int | None = None
    split: str = "test"
    max_steps: int | None = None
    mode: str = CORRECTED
    quirks: Quirks = field(default_factory=Quirks)
    follow_record: bool = True
    keep_to_record: bool = False
    templates: str = "full"
    intervals: bool = True
    support_limit: float = 0.01
    concurrency: int = 256
    attempts: int = 2
    prefix_caching: bool = False
    probabilities: bool = False
    seed: int = 0
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    dialogue: DialogueConfig = field(default_factory=DialogueConfig)

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda n: n >= 1, "concurrency", "attempts")
        require(self, "at least 1", lambda n: n is None or n >= 1, "patients", "max_steps")
        if self.keep_to_record and not (self.follow_record and self.dialogue.memory == DECISION):
            raise InputError(
                "keep_to_record: a conversation must not remember prescriptions that were not "
                "given; set dialogue.memory=decision, and follow_record"
            )
        require(self, f"one of {AGENT_MODES}", lambda name: name in AGENT_MODES, "mode")
        splits = (*schema.SPLITS, "all")
        require(self, f"one of {', '.join(splits)}", lambda name: name in splits, "split")

    def chosen(self, recorded: Episodes) -> Episodes:
        """The stays that are treated, of those recorded."""
        of_split = recorded if self.split == "all" else recorded.of_split(self.split)
        return of_split.select(slice(self.patients))


@dataclass(frozen=True)
class _Unit:
    """The world that patients live in, and who they are."""

    env: SepsisEnv
    patients: np.ndarray  # [N] int32 identities
    keys: jax.Array  # [N]
    stays: np.ndarray | None  # [N] indices of recorded stays
    recorded: np.ndarray | None  # [N, T] actions that are given whatever is prescribed
    real: dict[int, JsonDict]  # recorded courses by patient

    def pool(self, forecaster: Forecaster | None, slots: np.ndarray) -> EnvPool:
        """Some of the patients, at the start."""
        stays = None if self.stays is None else self.stays[slots]
        admission = reset_batch(self.env, self.keys[slots], self.patients[slots], stays=stays)
        recorded = None if self.recorded is None else self.recorded[slots]
        return EnvPool(self.env, admission, forecaster, recorded=recorded)


def run_agent(
    out: Path,
    options: AgentOptions,
    backend: BackendOptions,
    *,
    model: Path | None = None,
    episodes: Path | None = None,
    behavior: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> JsonDict:
    """Treats all patients; writes records.jsonl, summary.json and a manifest.

    Args:
      out: folder to write, or to go on with.
      options: what is asked.
      backend: which language model.
      model: world model that answers simulations; without one the agent has no such tool.
      episodes: recorded stays, which then live in the world model; otherwise patients live in the
        synthetic world.
      behavior: cloned clinician, for warnings where a treatment has no support.
      resume: go on with what an earlier run of the same request left.
      progress: called when stays end.

    Returns:
      The summary, as `policy.agent.records.summarize`.

    Raises:
      InputError: inputs that cannot be read or do not fit, or a folder in the way.
    """
    if options.keep_to_record and episodes is None:
        raise InputError("keep_to_record: needs recorded stays; name them in episodes")
    if episodes is not None and model is None:
        raise InputError("model: recorded stays are simulated in a world model; name one")
    world_model = None if model is None else load_world_model(model)
    quirks = options.quirks.of_mode(options.mode)
    if episodes is None and quirks.of_record:
        raise InputError(
            f"mode: {', '.join(quirks.of_record)} need recorded stays; name them in episodes"
        )
    options = replace(
        options,
        forecast=quirks.forecast(options.forecast),
        dialogue=quirks.dialogue(options.dialogue),
    )
    forecaster = None
    if world_model is not None:
        forecaster = make_forecaster(
            quirks,
            world_model,
            jax.random.fold_in(jax.random.key(options.seed), keys.AGENT_FORECASTS),
            options.forecast,
            behavior=None if behavior is None else load_policy(behavior),
        )
    unit = _unit(options, world_model, episodes, quirks)
    prompts = Prompts(
        options.templates,
        hours=schema.STEP_HOURS if world_model is None else world_model.step_hours,
        max_simulations=options.dialogue.max_simulations,
        support_limit=options.support_limit,
        intervals=options.intervals and options.forecast.mode != "reference",
    )
    inputs = {"model": model, "episodes": episodes, "behavior": behavior}
    request = {
        "options": plain(options),
        "backend": plain(backend),
        "inputs": {name: path and str(path.resolve()) for name, path in inputs.items()},
    }
    at_once = min(options.concurrency, len(unit.patients))
    language_model = open_backend(backend, kept=at_once if options.prefix_caching else 0)
    scorer = None
    if options.probabilities:
        if not isinstance(language_model, TokenBackend):
            raise InputError("probabilities: need the embedded or the vllm backend")
        scorer = ActionScorer(language_model)
    with run_folder(out, KIND, request, resume=resume, keeps=(RECORDS_FILE,)):
        records = Records(out / RECORDS_FILE)
        asyncio.run(
            _treat(unit, forecaster, language_model, scorer, prompts, options, records, progress)
        )
    found = summarize(
        last_attempts(out / RECORDS_FILE).values(),
        step_hours=prompts.hours,
        dose_edges=schema.DEFAULT_DOSE_EDGES if world_model is None else world_model.dose_edges,
    )
    write_json(out / SUMMARY, found)
    return found


async def _treat(
    unit: _Unit,
    forecaster: Forecaster | None,
    backend: Backend,
    scorer: ActionScorer | None,
    prompts: Prompts,
    options: AgentOptions,
    records: Records,
    progress: Progress,
) -> None:
    total = len(unit.patients)
    begun = {int(patient): records.attempts.get(int(patient), 0) for patient in unit.patients}

    def finished(stay: Stay) -> None:
        attempt = records.attempts.get(stay.patient, 0)
        real = unit.real.get(stay.patient)
        records.append(to_record(stay, attempt=attempt, real=real, model=backend.name))
        progress(f"{len(records.completed)} of {total} stays", len(records.completed) / total)

    try:
        for round_ in range(options.attempts):
            slots = np.array(
                [
                    slot
                    for slot, patient in enumerate(unit.patients.tolist())
                    if patient not in records.completed
                    and records.attempts.get(patient, 0) - begun[patient] == round_
                ],
                np.int32,
            )
            if not len(slots):
                break
            pool = unit.pool(forecaster, slots)
            chosen = unit.patients[slots].tolist()
            try:
                await treat_all(
                    chosen, backend, pool, prompts, options.dialogue,
                    seeds=[
                        options.seed + 1_000_003 * records.attempts.get(patient, 0)
                        for patient in chosen
                    ],
                    concurrency=options.concurrency,
                    finished=finished,
                    scorer=scorer,
                )  # fmt: skip
            finally:
                pool.close()
    finally:
        await backend.close()


def _unit(
    options: AgentOptions, world_model: WorldModel | None, episodes: Path | None, quirks: Quirks
) -> _Unit:
    key = jax.random.key(options.seed)
    if episodes is None:
        if options.patients is not None:
            require_memory("patients", options.patients, _PATIENT_BYTES)
        patients = np.arange(options.patients or SYNTHETIC_PATIENTS, dtype=np.int32)
        env = SepsisEnv.synthetic(config=Config(past=Forecaster.past), max_steps=options.max_steps)
        return _Unit(env, patients, patient_keys(key, patients), None, None, {})
    assert world_model is not None
    recorded = options.chosen(load_episodes_for(world_model, episodes))
    patients = np.asarray(recorded.stay_id)
    env = learned_env(
        world_model, recorded, quirks,
        follow_record=options.follow_record, max_steps=options.max_steps,
    )  # fmt: skip
    stays = np.arange(len(patients), dtype=np.int32)
    given = np.asarray(recorded.action) if options.keep_to_record else None
    courses = _recorded_courses(recorded)
    return _Unit(env, patients, patient_keys(key, patients), stays, given, courses)


def _recorded_courses(episodes: Episodes) -> dict[int, JsonDict]:
    rewards = np.asarray(episode_rewards(episodes)).sum(1)
    found = {}
    for i, stay in enumerate(np.asarray(episodes.stay_id).tolist()):
        length = int(episodes.length[i])
        found[stay] = {
            "total_reward": float(rewards[i]),
            "trajectory_length": length,
            "outcome": DEATH if bool(episodes.died_90d[i]) else RELEASE,
            "actions": actions_text(np.asarray(episodes.action[i, :length]).tolist()),
        }
    return found
