"""What the stages share: a model to train, sequences to train it on, and what is left of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from policy.qwen3.lora import add_adapters, merge_adapters
from policy.qwen3.model import Qwen3
from policy.qwen3.sharding import make_mesh
from policy.qwen3.weights import load, save_hf
from policy.train.checkpoints import Checkpoints
from policy.train.configuration import LearnerConfig
from policy.train.data import Dialogue, batches, cut, pack
from policy.train.distributed import is_first, wait, whole
from policy.train.learner import Learner, cast
from policy.train.losses import cross_entropy
from policy.train.metrics import MetricsLog, Report
from policy.train.throughput import Throughput, flops_per_token, peak_flops
from sepsis_jax.progress import Progress
from worldmodel.configuration import require

MODEL, CHECKPOINTS, METRICS = "model", "checkpoints", "metrics"


@dataclass(frozen=True)
class ModelOptions:
    """How the model lies in memory, and what of it is trained.

    Attributes:
      dtype: of activations and products; that of the files if not given.
      save_dtype: of the weights that a stage leaves; that of the files if not given.
      lora_rank: trains adapters of this rank alone, which are merged in the end; 0 trains all.
      lora_alpha: their strength.
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
        """Of all devices; None where there is one."""
        count = jax.device_count()
        if count == 1:
            return None
        fsdp = self.fsdp or count // self.tensor
        return make_mesh(data=count // (fsdp * self.tensor), fsdp=fsdp, tensor=self.tensor)


@dataclass(frozen=True)
class Pupil:
    """A model to train."""

    model: Qwen3
    folder: Path  # that it came from
    trainable: Any  # filter of NNX
    mesh: Mesh | None
    options: ModelOptions

    @classmethod
    def load(cls, folder: Path, options: ModelOptions, *, seed: int) -> Pupil:
        """A model of a Hugging Face folder, with adapters where they are wanted.

        Raises:
          InputError: as `qwen3.load`.
        """
        mesh = options.mesh()
        model = load(folder, dtype=options.dtype, mesh=mesh)
        trainable: Any = nnx.Param
        if options.lora_rank:
            model = add_adapters(
                model, rank=options.lora_rank, alpha=options.lora_alpha, rngs=nnx.Rngs(seed)
            )
            trainable = nnx.LoRAParam
        return cls(model, folder, trainable, mesh, options)

    def learner(self, loss: Any, config: LearnerConfig) -> Learner:
        """A learner of it."""
        return Learner(self.model, loss, config, trainable=self.trainable, mesh=self.mesh)

    def throughput(self, length: int) -> Throughput:
        """Tokens per second and MFU, for rows of a length."""
        adapters = bool(self.options.lora_rank)
        flops = flops_per_token(self.model.config, length, adapters=adapters)
        return Throughput(flops, peak_flops())

    @property
    def dtype(self) -> Any:
        """Of the weights that others get."""
        kind = next(iter(jax.tree.leaves(nnx.state(self.model, nnx.Param)))).dtype
        return self.options.save_dtype or kind

    def save(self, learner: Learner, out: Path) -> Path:
        """Writes what was learned as a Hugging Face folder `out/model`."""
        trained = whole(cast(merge_adapters(learner.model()), self.dtype))
        if is_first():
            save_hf(trained, out / MODEL, source=self.folder)
        wait(f"saved {out}")
        return out / MODEL


@dataclass(frozen=True)
class SupervisedOptions:
    """How sequences are learned.

    Attributes:
      row_length: tokens per row.
      rows: per micro-batch.
      model: what is trained.
      learner: how.
    """

    row_length: int = 4096
    rows: int = 8
    model: ModelOptions = field(default_factory=ModelOptions)
    learner: LearnerConfig = field(default_factory=LearnerConfig)

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda n: n >= 1, "row_length", "rows")


def learn(
    out: Path,
    llm: Path,
    dialogues: Sequence[Dialogue],
    options: SupervisedOptions,
    *,
    request: dict[str, Any],
    seed: int,
    progress: Progress,
) -> list[Report]:
    """Trains a model on sequences and writes `out/model`, `out/metrics` and `out/checkpoints`.

    What was done before, by checkpoints of the same request, is not done again.

    Raises:
      InputError: as `Learner.run`, `Checkpoints` and `cut`.
    """
    pupil = Pupil.load(llm, options.model, seed=seed)
    learner = pupil.learner(partial(cross_entropy, remat=options.model.remat), options.learner)
    checkpoints = Checkpoints(out / CHECKPOINTS, fingerprint=request)
    learner.resume(checkpoints)
    parts = [part for one in dialogues for part in cut(one, options.row_length)]
    rows = pack(parts, options.row_length, seed=seed)
    todo = islice(batches(rows, options.rows, seed=seed), learner.consumed, None)
    throughput = pupil.throughput(options.row_length)
    with MetricsLog(out / METRICS, resume_at=learner.step, throughput=throughput) as log:
        reports = learner.run(
            todo,
            report=_both(log.report, partial(_tell, progress, options.learner.steps)),
            checkpoints=checkpoints,
        )
    checkpoints.close()
    pupil.save(learner, out)
    return reports


def _both(*reports: Callable[[Report], None]) -> Callable[[Report], None]:
    def report(found: Report) -> None:
        for one in reports:
            one(found)

    return report


def _tell(progress: Progress, steps: int, report: Report) -> None:
    what = f"update {report.step} of {steps}, loss {report.loss:.3f}"
    progress(what, report.step / steps)
