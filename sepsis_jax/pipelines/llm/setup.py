"""Parts that the three stages share: the model to train, supervised training, and the runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from policy import registry
from policy.agent.dialogue import DECISION, DialogueConfig
from policy.agent.forecast import ForecastConfig, Forecaster
from policy.agent.prompts import Prompts
from policy.agent.tools import DecisionTokens
from policy.base import Policy
from policy.planner import PlannerConfig
from policy.qwen3.config import load_stop_ids
from policy.qwen3.lora import add_adapters, merge_adapters
from policy.qwen3.model import Qwen3
from policy.qwen3.prefix_cache import rows_kept
from policy.qwen3.sharding import make_mesh
from policy.qwen3.weights import load, save_hf
from policy.serving.backend import Lockstep
from policy.serving.embedded import EmbeddedGenerator
from policy.train.data.packing import Dialogue, batches, cut, pack
from policy.train.episodes import EpisodeRunner
from policy.train.loop.checkpoints import Checkpoints
from policy.train.loop.distributed import is_first, wait, whole
from policy.train.loop.learner import Learner, cast
from policy.train.loop.metrics import MetricsLog, Report, Throughput, flops_per_token, peak_flops
from policy.train.loop.optimizer import LearnerConfig, Loss
from policy.train.losses import cross_entropy
from sepsis_jax.pipelines.policy_training import CloneConfig, fit_clone, make_planner
from sepsis_jax.runs import JsonDict, Progress
from worldmodel import keys
from worldmodel.configuration import require
from worldmodel.envs.env import SepsisEnv
from worldmodel.episode_files import load_episodes, load_episodes_for
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import load_world_model
from worldmodel.resources import bucket
from worldmodel.synthetic import Config

MODEL, CHECKPOINTS, METRICS = "model", "checkpoints", "metrics"
KEPT = (MODEL, CHECKPOINTS)  # what a run that fails leaves


@dataclass(frozen=True)
class ModelOptions:
    """Types and sharding of the model, and which parameters are trained.

    Attributes:
      dtype: of activations and products; that of the files if not given.
      save_dtype: of saved weights; that of the files if not given.
      lora_rank: trains adapters of this rank alone, which are merged in the end; 0 trains all.
      lora_alpha: scale of the adapters.
      fsdp, tensor: devices that share parameters, and that share each product; the others share
        rows. 0 takes all that are left.
      remat: what is computed again in the backward pass: none, dots or full.
    """

    dtype: str | None = None
    save_dtype: str | None = None
    lora_rank: int = 0
    lora_alpha: float = 32.0
    fsdp: int = 0
    tensor: int = 1
    remat: str = "none"

    def __post_init__(self) -> None:
        require(self, "0 or more", lambda n: n >= 0, "lora_rank", "fsdp")
        require(self, "at least 1", lambda n: n >= 1, "tensor")
        require(self, "above 0", lambda x: x > 0, "lora_alpha")

    def mesh(self) -> Mesh | None:
        """Mesh of all devices; None if there is only one.

        Raises:
          InputError: the devices cannot be shared out like that.
        """
        count = jax.device_count()
        if count == 1:
            return None
        data, fsdp, tensor = self.shape(count)
        return make_mesh(data=data, fsdp=fsdp, tensor=tensor)

    def shape(self, count: int) -> tuple[int, int, int]:
        """Sizes of the mesh's axes data, fsdp and tensor, over a number of devices.

        Raises:
          InputError: they cannot be shared out like that.
        """
        fsdp = self.fsdp or max(count // self.tensor, 1)
        if count % (fsdp * self.tensor):
            raise InputError(
                f"model: fsdp {fsdp} x tensor {self.tensor} does not divide {count} devices; set "
                "model.fsdp=0 to share the parameters out over all of them"
            )
        return count // (fsdp * self.tensor), fsdp, self.tensor

    def sampler_mesh(self) -> Mesh | None:
        """Mesh of this process's devices, for its sampler; None if there is only one."""
        if jax.process_count() == 1:
            return self.mesh()
        own = jax.local_devices()
        if len(own) == 1:
            return None
        if len(own) % self.tensor:
            raise InputError(
                f"model: tensor {self.tensor} does not divide the {len(own)} devices of a process"
            )
        return make_mesh(fsdp=len(own) // self.tensor, tensor=self.tensor, devices=own)


@dataclass(frozen=True)
class TrainableModel:
    """A model to train."""

    model: Qwen3
    folder: Path  # that it came from
    trainable: nnx.filterlib.Filter  # filter of NNX
    mesh: Mesh | None
    options: ModelOptions

    @classmethod
    def load(cls, folder: Path, options: ModelOptions, *, seed: int) -> TrainableModel:
        """A model of a Hugging Face folder, with adapters where they are wanted.

        Raises:
          InputError: as `qwen3.load`.
        """
        mesh = options.mesh()
        model = load(folder, dtype=options.dtype, mesh=mesh)
        trainable: nnx.filterlib.Filter = nnx.Param
        if options.lora_rank:
            model = add_adapters(
                model, rank=options.lora_rank, alpha=options.lora_alpha, rngs=nnx.Rngs(seed)
            )
            trainable = nnx.LoRAParam
        return cls(model, folder, trainable, mesh, options)

    def without_arrays(self) -> TrainableModel:
        """The same with shapes alone, once a learner has copied the parameters."""
        graphdef, state = nnx.split(self.model)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        return replace(self, model=nnx.merge(graphdef, shapes))

    def learner(self, loss: Loss, config: LearnerConfig) -> Learner:
        """A learner of it."""
        return Learner(self.model, loss, config, trainable=self.trainable, mesh=self.mesh)

    def throughput(self, length: int) -> Throughput:
        """Tokens per second and MFU, for rows of a length."""
        adapters = bool(self.options.lora_rank)
        flops = flops_per_token(self.model.config, length, adapters=adapters)
        return Throughput(flops, peak_flops())

    @property
    def dtype(self) -> DTypeLike:
        """Of the weights that others get."""
        kind = next(iter(jax.tree.leaves(nnx.state(self.model, nnx.Param)))).dtype
        return self.options.save_dtype or kind

    def save(self, learner: Learner, out: Path) -> Path:
        """Writes what was learned as a Hugging Face folder `out/model`."""
        trained = whole(cast(merge_adapters(learner.present()), self.dtype))
        if is_first():
            save_hf(trained, out / MODEL, source=self.folder)
        wait(f"saved {out}")
        return out / MODEL


@dataclass(frozen=True)
class SupervisedOptions:
    """Settings of supervised training.

    Attributes:
      row_length: tokens per row.
      micro_batch_size: rows per micro-batch.
      model: types, sharding and adapters of the model.
      learner: optimizer and training loop.
      decision_weight: of the two tokens of a prescription that decide, where the demonstrator's
        probabilities are known; every other token has 1.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "rows": "micro_batch_size",
    }

    row_length: int = 4096
    micro_batch_size: int = 8
    model: ModelOptions = field(default_factory=ModelOptions)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    decision_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda n: n >= 1, "row_length", "micro_batch_size")
        require(self, "above 0", lambda x: x > 0, "decision_weight")


def learn(
    out: Path,
    llm: Path,
    dialogues: Sequence[Dialogue],
    options: SupervisedOptions,
    *,
    request: JsonDict,
    seed: int,
    progress: Progress,
    decisions: DecisionTokens | None = None,
) -> list[Report]:
    """Trains a model on sequences and writes `out/model`, `out/metrics` and `out/checkpoints`.

    Resumes from checkpoints of the same request.

    Raises:
      InputError: as `Learner.run`, `Checkpoints` and `cut`.
    """
    trainable = TrainableModel.load(llm, options.model, seed=seed)
    loss = partial(
        cross_entropy,
        levels=() if decisions is None else decisions.levels,
        decision_weight=options.decision_weight,
        remat=options.model.remat,
    )
    learner = trainable.learner(loss, options.learner)
    trainable = trainable.without_arrays()
    checkpoints = Checkpoints(out / CHECKPOINTS, fingerprint=request)
    learner.resume(checkpoints)
    parts = [part for one in dialogues for part in cut(one, options.row_length)]
    rows = pack(parts, options.row_length, seed=seed)
    todo = islice(batches(rows, options.micro_batch_size, seed=seed), learner.consumed, None)
    throughput = trainable.throughput(options.row_length)
    with MetricsLog(out / METRICS, resume_at=learner.step, throughput=throughput) as log:
        reports = learner.run(
            todo,
            report=_both(log.report, partial(_tell, progress, options.learner.max_steps)),
            checkpoints=checkpoints,
        )
    checkpoints.close()
    trainable.save(learner, out)
    return reports


def _both(*reports: Callable[[Report], None]) -> Callable[[Report], None]:
    def report(found: Report) -> None:
        for one in reports:
            one(found)

    return report


def _tell(progress: Progress, steps: int, report: Report) -> None:
    what = f"update {report.step} of {steps}, loss {report.loss:.3f}"
    progress(what, report.step / steps)


SYNTHETIC, LEARNED = WORLDS = ("synthetic", "learned")


@dataclass(frozen=True)
class RunnerOptions:
    """Settings of a runner.

    Attributes:
      world: environment: "synthetic", or "learned" for the world model, started from recorded
        stays.
      max_steps: decisions per stay at most.
      templates: as for the agent.
      intervals: show 90% intervals of forecasts.
      concurrency: stays in treatment at the same time, in each process.
      cache_tokens: as for `EmbeddedGenerator`, of each process; 0 for no limit.
      prefix_caching: keep the keys and values of the last turn of all dialogues in treatment; takes
        twice the memory of the cache more.
      forecast: settings of simulations.
      dialogue: limits of dialogues, and sampling of replies.
      seed: of patients.
    """

    world: str = SYNTHETIC
    max_steps: int | None = None
    templates: str = "full"
    intervals: bool = True
    concurrency: int = 64
    cache_tokens: int = 0
    prefix_caching: bool = False
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    dialogue: DialogueConfig = field(default_factory=lambda: DialogueConfig(memory=DECISION))
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, f"one of {WORLDS}", WORLDS.__contains__, "world")
        require(self, "at least 1", lambda n: n >= 1, "concurrency")
        require(self, "0 or more", lambda n: n >= 0, "cache_tokens")

    @property
    def prefix_rows(self) -> int:
        """Rows that the sampler keeps."""
        return rows_kept(self.concurrency) if self.prefix_caching else 0


def open_runner(options: RunnerOptions, model: Path, episodes: Path | None) -> EpisodeRunner:
    """A runner whose world model answers simulations.

    Args:
      options: settings.
      model: world model; answers simulations.
      episodes: recorded stays, for the "learned" world; its training split is treated.

    Raises:
      InputError: an input cannot be read, or stays are missing.
    """
    world_model = load_world_model(model)
    key = jax.random.fold_in(jax.random.key(options.seed), keys.LLM_FORECASTS)
    if options.world == SYNTHETIC:
        env = SepsisEnv.synthetic(config=Config(past=Forecaster.past), max_steps=options.max_steps)
    else:
        if episodes is None:
            raise InputError(
                "episodes: none given, but patients of the learned world start from recorded stays"
            )
        recorded = load_episodes_for(world_model, episodes).of_split("train")
        env = SepsisEnv.learned(
            world_model, recorded, past=Forecaster.past,
            mortality_each_step=False, max_steps=options.max_steps,
        )  # fmt: skip
    return EpisodeRunner(
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
    model: Qwen3,
    folder: Path,
    options: RunnerOptions,
    lockstep: Lockstep,
    *,
    mesh: Mesh | None = None,
) -> EmbeddedGenerator:
    """The sampler of this process, for all concurrent dialogues of a runner.

    Batches are padded to at least an eighth of these, since few dialogues are left near the end of
    a batch of stays and a padded row costs as much as any other.

    Args:
      model: the model.
      folder: that it came from, and whose stop tokens are its.
      options: of the runner.
      lockstep: shared with the pool.
      mesh: that its weights are laid out over.
    """
    rows = bucket(options.concurrency)
    return EmbeddedGenerator(
        model, stop_ids=load_stop_ids(folder), name=str(folder),
        min_batch=max(rows // 8, 1), max_batch=rows, cache_tokens=options.cache_tokens,
        prefix_rows=options.prefix_rows, lockstep=lockstep, mesh=mesh,
    )  # fmt: skip


def evaluation_runner(runner: EpisodeRunner, options: RunnerOptions, *, seed: int) -> EpisodeRunner:
    """A copy of a runner with fresh patients of the synthetic environment."""
    env = SepsisEnv.synthetic(config=Config(past=Forecaster.past), max_steps=options.max_steps)
    return replace(runner, env=env, seed=seed)


PLANNER = "planner"


def open_policy(
    name: str,
    episodes: Path | None = None,
    model: Path | None = None,
    planner: PlannerConfig | None = None,
) -> Policy:
    """A simple policy such as guideline, a clone of the clinician, a planner, or of a folder.

    Args:
      name: of a simple policy; "clinician", which is cloned from the episodes first; "planner",
        which searches the world model with that clone; or a folder.
      episodes: recorded stays.
      model: world model of a planner.
      planner: settings of a planner; the default ones if not given.

    Raises:
      InputError: none of these, or the clinician's records or the planner's model are missing.
    """
    if name == PLANNER:
        if model is None or episodes is None:
            raise InputError("planner: needs a world model to search, and recorded stays")
        world_model = load_world_model(model)
        recorded = load_episodes_for(world_model, episodes)
        clinician = fit_clone(recorded, CloneConfig()).policy
        config = planner or PlannerConfig()
        return make_planner(recorded, world_model, None, clinician, config).policy

    def clone() -> Policy:
        if episodes is None:
            raise InputError(
                "episodes: none given, but the clinician is cloned from recorded stays"
            )
        return fit_clone(load_episodes(episodes), CloneConfig()).policy

    return registry.open_policy(name, clinician=clone)
