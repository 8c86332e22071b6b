"""The benchmark: builds the contenders, times them in turns, compares and writes the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import jax
import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

from sepsis_jax.benchmark.hardware import (
    jax_products,
    minimal_flops,
    plain_flops,
    recurrent_flops,
    torch_products,
)
from sepsis_jax.benchmark.jax_runners import (
    QUESTION,
    agent_questions,
    drift,
    jitted_rollout,
    plain_model,
    sharded,
)
from sepsis_jax.benchmark.setup import Workload, patient_pool, require_branches, shape_of, workload
from sepsis_jax.benchmark.timing import Contender, Timed, best, summary, take_turns
from sepsis_jax.benchmark.torch_model import load_torch, torch_installed
from sepsis_jax.benchmark.torch_runners import (
    COMPILED,
    EAGER,
    ONE_BRANCH,
    torch_contender,
    torch_device,
)
from sepsis_jax.report.figures import COLORS
from sepsis_jax.runs import JsonDict, Progress, silent
from worldmodel import schema
from worldmodel.configuration import require
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, write_json
from worldmodel.models.clinical_model import PRECISIONS
from worldmodel.models.world_model import WorldModel
from worldmodel.resources import BFLOAT16
from worldmodel.simulate.rollout import CHART_FEATURES, require_rollouts
from worldmodel.simulate.unroll import KERNELS

PLAIN = "plain model"
JAX_ROLLOUTS: dict[str, Callable[[Workload], Contender]] = {
    "rollout": jitted_rollout,
    "rollout, all features": lambda job: jitted_rollout(
        job, "rollout, all features", features=schema.FEATURE_NAMES
    ),
    "sharded": sharded,
    "sharded, bfloat16": lambda job: sharded(job, "sharded, bfloat16", precision=BFLOAT16),
    PLAIN: plain_model,
}
_FLOAT32 = ("rollout", "sharded")  # those compared with torch and with the bound
NAMES = (*JAX_ROLLOUTS, EAGER, COMPILED, ONE_BRANCH, QUESTION)
BRANCHES = {"cpu": (64, 256, 1024, 4096)}
_BRANCHES_ACCELERATOR = (1024, 8192, 65_536, 524_288)


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
      branches: numbers of branches, each a multiple of plans x samples; () for the device's own.
      plans: per patient.
      samples: per plan.
      horizon: steps.
      repeats: timed runs of each contender.
      question_samples: per treatment in the agent's question.
      seed: of patients and plans.
      only: contenders to measure; () for all.
      kernel: of the sharded rollouts, as for `RolloutConfig`.
    """

    branches: tuple[int, ...] = ()
    plans: int = 4
    samples: int = 16
    horizon: int = 24
    repeats: int = 10
    question_samples: int = 1000
    seed: int = 0
    only: tuple[str, ...] = ()
    kernel: str = "auto"

    def __post_init__(self) -> None:
        counts = ("plans", "samples", "horizon", "repeats", "question_samples")
        require(self, "at least 1", lambda value: value >= 1, *counts)
        require(self, f"one of {', '.join(KERNELS)}", KERNELS.__contains__, "kernel")
        unknown = [name for name in self.only if name not in NAMES]
        if unknown:
            raise InputError(f"only: {unknown[0]!r} is unknown; known: {'; '.join(NAMES)}")
        for branches in self.branches:
            shape = shape_of(branches, plans=self.plans, samples=self.samples)
            require_branches(shape, self.horizon)
        require_rollouts(
            self.question_samples, patients=1, plans=schema.NUM_ACTIONS, horizon=1,
            features=len(CHART_FEATURES), setting="question_samples",
        )  # fmt: skip

    def asks(self, name: str) -> bool:
        """Whether a contender is wanted."""
        return not self.only or name in self.only


def run_bench(
    world_model: WorldModel, options: BenchOptions, progress: Progress = silent
) -> JsonDict:
    """Measures and compares.

    Args:
      world_model: model whose first member is simulated.
      options: what to measure.
      progress: called with (phase, share done).

    Returns:
      JSON-ready: `table` (a row per contender and number of branches), `peak`, `bound`,
      `ratios`, `question`, `drift`, `flops`.
    """
    world_model = world_model.member(0)
    precision = world_model.config.precision
    assert precision in PRECISIONS
    known = names_of(world_model)
    unknown = [name for name in options.only if name not in known]
    if unknown:
        raise InputError(
            f"only: {unknown[0]!r} reads windows, and this model is recurrent; known for it: "
            f"{'; '.join(known)}"
        )
    torch = load_torch(precision) if torch_wanted(world_model) else None
    pool = patient_pool(world_model, options.seed)
    default = BRANCHES.get(jax.default_backend(), _BRANCHES_ACCELERATOR)
    jobs = [
        workload(
            world_model,
            pool,
            shape_of(branches, plans=options.plans, samples=options.samples),
            options.horizon,
            seed=options.seed,
            kernel=options.kernel,
        )
        for branches in sorted(options.branches or default)
    ]
    contenders = _rollout_contenders(jobs, options, torch, progress)
    questions = (
        agent_questions(world_model, pool, options.question_samples)
        if options.asks(QUESTION)
        else []
    )
    products = jax_products(precision)
    if options.asks("sharded, bfloat16"):
        products += jax_products(BFLOAT16)
    if torch is not None:
        products += torch_products(torch, torch_device(torch, jax.default_backend()))
    timed = take_turns([*contenders, *questions, *products], options.repeats, progress)
    rollouts, rest = timed[: len(contenders)], timed[len(contenders) :]
    answered, multiplied = rest[: len(questions)], rest[len(questions) :]
    jax_timed = [
        found for found in multiplied if found.contender.name.startswith(f"JAX {precision}")
    ]
    minimal = {job.shape.branches: _minimal(job) for job in jobs}
    return {
        "table": [_row(found, jobs, best(jax_timed), minimal) for found in rollouts],
        "peak": [{"name": found.contender.name, **summary(found.rates)} for found in multiplied],
        "bound": _bound(rollouts, best(jax_timed), minimal),
        "ratios": _ratios(rollouts),
        "question": [_answer(found) for found in answered],
        "drift": {
            name: drift(_drift_job(jobs), name)
            for name in _reduced(precision)
            if options.asks("sharded, bfloat16")
        },
        "flops": {
            "plain": _plain(jobs[0]),
            "minimal": {str(branches): value for branches, value in minimal.items()},
        },
        "torch": torch is not None,
    }


def _rollout_contenders(
    jobs: Sequence[Workload], options: BenchOptions, torch: ModuleType | None, progress: Progress
) -> list[Contender]:
    """Compiled rollouts, of JAX and of torch; one of torch's simulates a single branch."""
    found: list[Contender] = []
    for index, job in enumerate(jobs):
        progress(f"compiling, {job.shape.branches} branches", index / len(jobs))
        known = names_of(job.world_model)
        found += [
            make(job) for name, make in JAX_ROLLOUTS.items() if name in known and options.asks(name)
        ]
        if torch is not None:
            device = torch_device(torch, jax.default_backend())
            found += [
                torch_contender(torch, job, device, name)
                for name in (EAGER, COMPILED)
                if options.asks(name)
            ]
    if torch is not None and options.asks(ONE_BRANCH):
        first = jobs[0]
        one = workload(
            first.world_model, first.start, shape_of(1, plans=1, samples=1), options.horizon,
            seed=options.seed,
        )  # fmt: skip
        device = torch_device(torch, jax.default_backend())
        found.append(torch_contender(torch, one, device, ONE_BRANCH))
    return found


def names_of(world_model: WorldModel) -> tuple[str, ...]:
    """Contenders that simulate a model: of the recurrent variant none that reads windows."""
    if not world_model.is_recurrent:
        return NAMES
    return tuple(name for name in NAMES if name not in (PLAIN, EAGER, COMPILED, ONE_BRANCH))


def torch_wanted(world_model: WorldModel) -> bool:
    """Whether torch is there and has contenders for a model."""
    return torch_installed() and EAGER in names_of(world_model)


def _minimal(job: Workload) -> float:
    config = job.world_model.config
    if job.start.memory is None:
        return minimal_flops(config, job.shape, job.horizon)
    recorded = job.start.memory.inputs.shape[1]
    return recurrent_flops(config, job.shape, job.horizon, recorded=recorded)


def _plain(job: Workload) -> float | None:
    """Of contenders that read windows; None for a model that reads none."""
    if job.world_model.is_recurrent:
        return None
    return plain_flops(job.world_model.config, job.horizon)


def _reduced(precision: str) -> list[str]:
    """Precisions whose drift is measured; on a CPU float32 products are exact, so not those."""
    own = [precision] if precision != "highest" and jax.default_backend() != "cpu" else []
    return [*own, BFLOAT16]


def _drift_job(jobs: Sequence[Workload]) -> Workload:
    """The largest workload of at most 1,024 branches, else the smallest."""
    small = [job for job in jobs if job.shape.branches <= 1024]
    return small[-1] if small else jobs[0]


def _row(
    found: Timed, jobs: Sequence[Workload], peak: Timed, minimal: dict[int, float]
) -> JsonDict:
    contender = found.contender
    engine = contender.name in JAX_ROLLOUTS and contender.name != PLAIN
    flops = minimal[contender.branches] if engine else _plain(jobs[0])
    assert flops is not None  # contenders that read windows have a model that does
    return {
        "name": contender.name,
        "branches": contender.branches,
        **summary(found.rates),
        "compile_seconds": contender.compile_seconds,
        "memory_bytes": contender.memory_bytes,
        "gflops": summary(found.rates)["median"] * flops / 1e9,
        "share_of_peak": summary(found.rates * flops / peak.rates)["median"],
        "checksum": found.checksum,
    }


def _bound(rollouts: Sequence[Timed], peak: Timed, minimal: dict[int, float]) -> JsonDict:
    """The rate that matrix products alone allow, and the share of it that JAX rollouts reach."""
    shares = {}
    for name in _FLOAT32:
        named = [found for found in rollouts if found.contender.name == name]
        if named:
            top = best(named)
            flops = minimal[top.contender.branches]
            shares[_title(top)] = summary(top.rates * flops / peak.rates)
    return {
        "shares": shares,
        "product": peak.contender.name,
        "flops_per_second": summary(peak.rates),
        "branch_steps_per_second": {
            str(branches): summary(peak.rates / flops) for branches, flops in minimal.items()
        },
    }


def _ratios(rollouts: Sequence[Timed]) -> JsonDict:
    """JAX rates divided by torch's, each at its best number of branches, repeat by repeat."""

    def champion(*names: str) -> Timed | None:
        named = [found for found in rollouts if found.contender.name in names]
        return best(named) if named else None

    fastest = champion(*_FLOAT32)
    out: JsonDict = {}
    others = {"batched torch": champion(EAGER, COMPILED), "torch, one branch": champion(ONE_BRANCH)}
    for name, other in others.items():
        if fastest and other:
            out[name] = {
                "ours": _title(fastest),
                "other": _title(other),
                **summary(fastest.rates / other.rates),
            }
    return out


def _title(found: Timed) -> str:
    return f"{found.contender.name}, {found.contender.branches} branches"


def _answer(found: Timed) -> JsonDict:
    """Latency of one question in ms."""
    return {
        "name": found.contender.name,
        "branches": found.contender.branches,
        **{f"{key}_ms": value for key, value in summary(1e3 / found.rates).items()},
        "compile_seconds": found.contender.compile_seconds,
        "checksum": found.checksum,
    }


matplotlib.use("Agg")


RESULT = "bench.json"
_MARKERS = "osD^vP*X"


def write_bench(result: JsonDict, out: Path) -> None:
    """Writes a result of `run_bench`: bench.json, bench.csv, scaling.png.

    Raises:
      InputError: something else is in the way.
    """
    with atomic_folder(out, marker=RESULT) as folder:
        write_json(folder / RESULT, result)
        table = pd.DataFrame(result["table"])
        table.to_csv(folder / "bench.csv", index=False)
        if len(table):
            scaling_figure(table, result, folder / "scaling.png")


def scaling_figure(table: pd.DataFrame, result: JsonDict, path: Path) -> None:
    """Branch-steps per second against branches, log-log, with the range of the repeats.

    Args:
      table: rows of `run_bench`'s table.
      result: the whole result, for the bound and the title.
      path: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(8, 5))
    for index, (name, rows) in enumerate(table.groupby("name", sort=False)):
        rows = rows.sort_values("branches")
        color = COLORS[index % len(COLORS)]
        style = "-" if index < len(COLORS) else "--"
        axis.fill_between(rows["branches"], rows["min"], rows["max"], color=color, alpha=0.15, lw=0)
        axis.plot(
            rows["branches"], rows["median"], style, marker=_MARKERS[index % len(_MARKERS)],
            color=color, ms=5, lw=1.5, label=name,
        )  # fmt: skip
    bound = result["bound"]["branch_steps_per_second"]
    branches = sorted(int(key) for key in bound)
    axis.plot(
        branches, [bound[str(key)]["median"] for key in branches], color="black", ls=":",
        label="bound: products alone, float32",
    )  # fmt: skip
    axis.set(
        xscale="log", yscale="log", xlabel="branches", ylabel="branch-steps per second",
        title=f"{result['hardware']['processor']}, {result['hardware']['cores']} cores"
        if result["hardware"]["backend"] == "cpu" else result["hardware"]["device"],
    )  # fmt: skip
    axis.grid(which="both", lw=0.3, alpha=0.5)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
