"""Stage III: reinforcement learning of a language model on simulated patients."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import jax

from policy.agent.dialogue import Stay
from policy.agent.tools import DecisionTokens
from policy.planner import Planner
from policy.serving.backend import Lockstep
from policy.serving.tokens import ChatTokens, TokenBackend
from policy.serving.vllm import VLLMGenerator
from policy.serving.vllm.check import require_logprobs
from policy.serving.vllm.control import WeightControl
from policy.train.loop.checkpoints import Checkpoints
from policy.train.loop.distributed import is_first, wait
from policy.train.loop.metrics import MetricsLog
from policy.train.loop.optimizer import LearnerConfig
from policy.train.rl.advantages import COUNTERFACTUAL
from policy.train.rl.counterfactual import counterfactual, planned
from policy.train.rl.publishers import (
    AdapterPublisher,
    EmbeddedPublisher,
    Publisher,
    ServerPublisher,
)
from policy.train.rl.trainer import ALL, AgenticConfig, AgenticTrainer, agentic_loss
from sepsis_jax.pipelines.agent import EMBEDDED, VLLM, BackendOptions, endpoint
from sepsis_jax.pipelines.llm.evaluation import evaluate, evaluate_stays
from sepsis_jax.pipelines.llm.setup import (
    CHECKPOINTS,
    KEPT,
    METRICS,
    ModelOptions,
    RunnerOptions,
    TrainableModel,
    evaluation_runner,
    open_generator,
    open_policy,
    open_runner,
)
from sepsis_jax.runs import JsonDict, Progress, plain, run_folder, silent
from worldmodel.configuration import require
from worldmodel.errors import InputError

KIND = "sepsis-jax language model, stage III"
VERSIONS, ADAPTERS = "versions", "adapters"


@dataclass(frozen=True)
class RLOptions:
    """Settings of stage III.

    Attributes:
      runner: environment and dialogues.
      agentic: batches, advantages and loss.
      learner: optimizer; `max_steps` is set to the updates of `agentic`.
      model: types, sharding and adapters of the model.
      publish: what is sent to a vLLM server: "weights", with adapters merged, or "adapters", if
        the server was started with their rank.
      continuation: policy that acts after each of the 25 actions, for counterfactual advantages:
        guideline, titration, clinician, or the folder of a policy; or planner, whose search of
        the world model then gives the advantages (`policy.train.rl.counterfactual.planned`).
      samples: futures per action; of a planner, per action and member of the world model.
      horizon: steps after the action; to the end of the stay if not given.
      smooth: as for `policy.train.rl.counterfactual.counterfactual`.
      eval_steps: iterations between two evaluations on held-out patients of the synthetic
        world; 0 for none.
      eval_patients: number of patients in an evaluation.
      eval_seed: of these patients.
      save_steps: iterations between two checkpoints.
      seed: of adapters and rounding.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "clinic": "runner",
        "judge_every": "eval_steps",
        "judge_patients": "eval_patients",
        "judge_seed": "eval_seed",
        "save_every": "save_steps",
    }

    runner: RunnerOptions = field(default_factory=RunnerOptions)
    agentic: AgenticConfig = field(default_factory=AgenticConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    model: ModelOptions = field(default_factory=ModelOptions)
    publish: str = "weights"
    continuation: str = "guideline"
    samples: int = 4
    horizon: int | None = None
    smooth: bool = False
    eval_steps: int = 0
    eval_patients: int = 256
    eval_seed: int = 1_000_000
    save_steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda n: n >= 1, "eval_patients", "save_steps", "samples")
        require(self, "0 or more", lambda n: n >= 0, "eval_steps")
        require(self, "weights or adapters", ("weights", ADAPTERS).__contains__, "publish")
        if self.publish == ADAPTERS and not self.model.lora_rank:
            raise InputError("publish: got adapters, but model.lora_rank is 0")


def run_rl(
    out: Path,
    options: RLOptions,
    *,
    llm: Path,
    model: Path,
    episodes: Path | None = None,
    backend: BackendOptions | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> dict[str, float]:
    """Samples stays and learns from them; writes `out/model`, `out/metrics` and `out/checkpoints`.

    Args:
      out: folder to write, or to go on with.
      options: settings.
      llm: Hugging Face folder to start from, such as stage II left it.
      model: folder of the world model that answers simulations.
      episodes: recorded stays, for the "learned" world.
      backend: generator: the sampler of this process, or a vLLM server of the same folder that was
        started with swaps, which reads weights from `out/versions`.
      resume: go on with an earlier run of the same request.
      progress: called with each iteration.

    Returns:
      Figures of the last iteration.

    Raises:
      InputError: inputs that cannot be read, another run in the folder, or a training that fails.
    """
    backend = backend or BackendOptions(kind=EMBEDDED, llm=str(llm))
    inputs = {"llm": llm, "model": model, "episodes": episodes}
    request = {
        "options": plain(options),
        "backend": backend.kind,
        **{name: path and str(path.resolve()) for name, path in inputs.items()},
    }
    with run_folder(out, KIND, request, resume=resume, keeps=KEPT):
        wait(f"begun {out}")  # all processes, before the first leaves something to resume
        return asyncio.run(_run(out, options, backend, request, llm, model, episodes, progress))


async def _run(
    out: Path,
    options: RLOptions,
    backend: BackendOptions,
    request: JsonDict,
    llm: Path,
    model: Path,
    episodes: Path | None,
    progress: Progress,
) -> dict[str, float]:
    config = options.agentic
    runner = open_runner(options.runner, model, episodes)
    trainable = TrainableModel.load(llm, options.model, seed=options.seed)
    steps = config.iterations * config.num_minibatches
    temperature = options.runner.dialogue.sampling.temperature
    if backend.kind == VLLM:
        await require_logprobs(endpoint(backend))
    tokens = ChatTokens.load(llm)
    decisions = DecisionTokens.of(tokens) if config.decision_loss == ALL else None
    learner = trainable.learner(
        agentic_loss(config, temperature, decisions),
        replace(
            options.learner, max_steps=steps, warmup_steps=min(options.learner.warmup_steps, steps)
        ),
    )
    state_scorer = None
    if config.advantages.kind == COUNTERFACTUAL:
        policy = open_policy(options.continuation, episodes, model)
        if isinstance(policy, Planner):
            state_scorer = planned(
                replace(policy, config=replace(policy.config, samples=options.samples))
            )
        else:
            state_scorer = counterfactual(
                runner.env,
                policy,
                samples=options.samples,
                horizon=options.horizon,
                smooth=options.smooth,
            )
    served = _Served(backend, trainable, tokens, out, options)
    reference = trainable.model if config.objective.beta else None
    trainable = trainable.without_arrays()
    trainer = AgenticTrainer(
        learner, runner, served.backend, served.publisher, config,
        reference=reference, state_scorer=state_scorer, decisions=decisions,
        lockstep=served.lockstep, dtype=trainable.dtype,
    )  # fmt: skip
    checkpoints = Checkpoints(out / CHECKPOINTS, fingerprint=request)
    trainer.resume(checkpoints)
    evaluator = evaluation_runner(runner, options.runner, seed=options.eval_seed)
    throughput = trainable.throughput(config.row_length)
    last: dict[str, float] = {}

    async def report(number: int, figures: dict[str, float], stays: Sequence[Stay]) -> None:
        nonlocal last
        found = evaluate_stays(stays)
        last = figures | {f"played_{name}": x for name, x in found.figures().items()}
        if is_first() and options.eval_steps and number % options.eval_steps == 0:
            held_out = await evaluate(
                evaluator, served.backend, options.eval_patients, lockstep=served.lockstep
            )
            last |= {f"held_out_{name}": x for name, x in held_out.figures().items()}
        timing = trainer.timing | throughput.update(
            figures.get("read_tokens", 0.0), trainer.timing["learn_seconds"]
        )
        log.write(number, last, timing)
        what = f"iteration {number} of {config.iterations}, mean reward {found.value:.2f}"
        progress(what, number / config.iterations)

    try:
        with MetricsLog(out / METRICS, resume_at=trainer.iteration) as log:
            await trainer.run(report, checkpoints=checkpoints, save_steps=options.save_steps)
    finally:
        await served.close()
        checkpoints.close()
    trainable.save(learner, out)
    return last


class _Served:
    """The generator, and the publisher that sends it new weights."""

    def __init__(
        self,
        backend: BackendOptions,
        trainable: TrainableModel,
        tokens: ChatTokens,
        out: Path,
        options: RLOptions,
    ):
        self.lockstep: Lockstep | None = None
        self._control: WeightControl | None = None
        self.publisher: Publisher
        if backend.kind == EMBEDDED:
            self.lockstep = Lockstep()
            generator = open_generator(
                trainable.model, trainable.folder, options.runner, self.lockstep,
                mesh=trainable.options.sampler_mesh(),
            )  # fmt: skip
            self.backend = TokenBackend(generator, tokens)
            self.publisher = EmbeddedPublisher(generator)
        elif backend.kind == VLLM:
            server = endpoint(backend)
            remote, versions = VLLMGenerator(server), out / VERSIONS
            if jax.process_count() > 1:  # each has a server of its own, on its loopback interface
                versions = versions / f"process-{jax.process_index()}"
            self.backend = TokenBackend(remote, tokens)
            self._control = control = WeightControl(server, trainable.folder)
            if options.publish == ADAPTERS:
                self.publisher = AdapterPublisher(control, remote, versions, base=trainable.folder)
            else:
                self.publisher = ServerPublisher(
                    control, versions, source=trainable.folder, dtype=trainable.dtype
                )
        else:
            raise InputError(
                f"backend: got {backend.kind!r}; learning needs tokens and log-probabilities, "
                f"so {EMBEDDED} or {VLLM}"
            )

    async def close(self) -> None:
        await self.backend.close()
        if self._control is not None:
            await self._control.close()
