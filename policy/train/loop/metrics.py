"""Metrics of a training run: JSON lines, TensorBoard, W&B, tokens per second and MFU."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, SupportsFloat

import jax
import numpy as np

from policy.qwen3.config import Qwen3Config
from worldmodel.errors import InputError

if TYPE_CHECKING:
    import wandb
    from tensorboardX import SummaryWriter

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


@dataclass(frozen=True)
class Report:
    """Means since the previous report."""

    step: int  # updates made
    loss: float  # per token
    tokens: float  # learned, per update
    tokens_read: float  # per update, padding apart; 0 for batches without `segments`
    tokens_per_s: float  # learned; the first report includes compilation
    seconds: float  # per update, likewise
    grad_norm: float  # before clipping
    learning_rate: float  # of the last update
    metrics: dict[str, float]  # of the loss


WANDB_PROJECT = "WANDB_PROJECT"


class MetricsLog:
    """A folder's metrics: one JSON line per report, and event files of TensorBoard.

    `metrics.jsonl` depends on data and seeds only, so that a resumed run has the same file;
    `timing.jsonl` has measured times. With several processes only the first writes. Where the
    environment names a `WANDB_PROJECT`, metrics go to Weights & Biases too, by its own variables
    (`WANDB_MODE=offline` needs no network).

    Args:
      folder: made if need be.
      resume_at: updates of the checkpoint that the run goes on from; later lines, of updates that
        will be made again, are removed. 0 begins anew.
      throughput: adds what it says to the timing.

    Raises:
      InputError: the folder cannot be written, or W&B is wanted and is not installed.
    """

    def __init__(
        self, folder: str | Path, *, resume_at: int = 0, throughput: Throughput | None = None
    ):
        self.folder = Path(folder).absolute()
        self._throughput = throughput
        self._files: dict[str, IO[str]] = {}
        self._events: SummaryWriter | None = None
        self._wandb: wandb.Run | None = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter  # imports torch, where that is installed

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (METRICS, TIMING):
                self._files[name] = _opened(self.folder / name, resume_at)
            purge = resume_at + 1 if resume_at else None
            self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot write metrics here ({error})") from None
        if project := os.environ.get(WANDB_PROJECT):
            name = self.folder.parent.name
            self._wandb = _wandb_run(project, self.folder, name=name, files=self.folder)

    def report(self, report: Report) -> None:
        """Writes a learner's report; to be given to `Learner.run`."""
        values = {
            name: getattr(report, name)
            for name in ("loss", "tokens", "tokens_read", "grad_norm", "learning_rate")
        }
        timing = {"tokens_per_s": report.tokens_per_s, "seconds": report.seconds}
        if self._throughput is not None:
            timing |= self._throughput.update(report.tokens_read, report.seconds)
        self.write(report.step, values | report.metrics, timing)

    def write(
        self, step: int, values: Mapping[str, float], timing: Mapping[str, float] | None = None
    ) -> None:
        """Writes a line, which is on the disk when this returns.

        Args:
          step: updates made; no smaller than that of the line before.
          values: by name, such as `reward`; what is not finite becomes null.
          timing: likewise, of the clock.

        Raises:
          InputError: the disk is full.
        """
        if self._events is None:
            return
        try:
            for name, found in ((METRICS, values), (TIMING, timing)):
                if found:
                    line = {"step": step} | {key: _number(x) for key, x in found.items()}
                    self._files[name].write(json.dumps(line) + "\n")
                    self._files[name].flush()
                    os.fsync(self._files[name].fileno())
            for name, value in {**values, **(timing or {})}.items():
                if _number(value) is not None:  # tensorboardX warns of every other one
                    self._events.add_scalar(name, value, step)
            self._events.flush()
            if self._wandb is not None:
                self._wandb.log({**values, **(timing or {})}, step=step)
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot write metrics ({error}); make room on the disk and start "
                "again"
            ) from None

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tokens_read(batch: object) -> int:
    """Tokens of a batch, padding apart: the entries of its `segments` that are not 0."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return sum(
        int(np.count_nonzero(leaf))
        for path, leaf in leaves
        if path and getattr(path[-1], "name", getattr(path[-1], "key", None)) == "segments"
    )


def check_wandb() -> None:
    """Refuses, before a training begins, what could not be sent at its end.

    Raises:
      InputError: the environment names a `WANDB_PROJECT`, and W&B is not installed.
    """
    if not os.environ.get(WANDB_PROJECT):
        return
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise InputError(
            f"{WANDB_PROJECT}: is set, but wandb is not installed; pip install "
            "sepsis-jax[wandb], or unset it"
        ) from None


def log_courses(folder: Path, courses: Mapping[str, Iterable[Mapping[str, float]]]) -> None:
    """Sends the courses of a finished training to W&B, where `WANDB_PROJECT` names a project.

    For trainers that keep their courses in files of their own. W&B's files go where its own
    variables say.

    Args:
      folder: of what was trained, which names the run.
      courses: by name, rows of figures.
    """
    if not (project := os.environ.get(WANDB_PROJECT)):
        return
    files = Path(os.environ.get("WANDB_DIR", "."))  # W&B reads it once in a process
    run = _wandb_run(project, folder.absolute(), name=folder.absolute().name, files=files)
    for name, rows in courses.items():
        for row in rows:
            run.log({f"{name}/{key}": value for key, value in row.items()})
    run.finish()


def _wandb_run(project: str, folder: Path, *, name: str, files: Path) -> wandb.Run:
    """The run of a folder: a resumed training goes on with the run that it began."""
    check_wandb()
    import wandb

    identity = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return wandb.init(project=project, dir=files, id=identity, name=name, resume="allow")


def _opened(path: Path, resume_at: int) -> IO[str]:
    kept = 0  # bytes
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):  # half a line, from when the run was killed
                break
            if step > resume_at or not line.endswith(b"\n"):
                break
            kept += len(line)
        os.truncate(path, kept if resume_at else 0)
    return path.open("a")


def _number(value: SupportsFloat) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; the first name that a
# device's kind contains.
_PEAKS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("v6 lite", 918e12),
    ("v6e", 918e12),
    ("v5 lite", 197e12),
    ("v5e", 197e12),
    ("v5", 459e12),
)


def peak_flops(kind: str | None = None) -> float | None:
    """bfloat16 FLOP/s of one device; None if unknown, as for CPUs.

    Args:
      kind: such as "NVIDIA H200" or "TPU v5 lite"; that of the first device if not given.
    """
    kind = jax.devices()[0].device_kind if kind is None else kind
    return next((peak for name, peak in _PEAKS if name.lower() in kind.lower()), None)


def multiplied(config: Qwen3Config) -> int:
    """Parameters that a token is multiplied by: all but norms and the table of embeddings.

    The output projection counts, whether it shares the table or not.
    """
    inner = config.num_attention_heads * config.head_dim
    outer = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * inner + 2 * outer + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer + config.hidden_size * config.vocab_size


def flops_per_token(config: Qwen3Config, length: float, *, adapters: bool = False) -> float:
    """Model FLOPs of training on one token, forward and backward.

    Args:
      config: of the model.
      length: tokens that attend to one another: a row's, or those of a dialogue in packed rows.
      adapters: only low-rank adapters are trained, so that the products which make the gradients
        of matrices (a third of all but attention's) are not needed.
    """
    products = (4 if adapters else 6) * multiplied(config)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return products + attention * length


class Throughput:
    """Moving averages of speed.

    Args:
      flops: of one token, as of `flops_per_token`.
      peak: FLOP/s of all devices together; None leaves MFU out.
      decay: weight of what was before, at each update.
    """

    def __init__(self, flops: float, peak: float | None, *, decay: float = 0.9):
        self._flops, self._peak, self._decay = flops, peak, decay
        self._tokens = self._seconds = 0.0
        self._first = True

    def update(self, tokens: float, seconds: float) -> dict[str, float]:
        """Adds what was just measured.

        Args:
          tokens: read, padding apart.
          seconds: that took. The first measurement includes compilation and does not count.

        Returns:
          `read_per_s` tokens and, where the peak is known, `mfu`; nothing at first.
        """
        if self._first:
            self._first = False
            return {}
        self._tokens = self._decay * self._tokens + tokens
        self._seconds = self._decay * self._seconds + seconds
        speed = self._tokens / self._seconds
        mfu = {} if self._peak is None else {"mfu": speed * self._flops / self._peak}
        return {"read_per_s": speed} | mfu
