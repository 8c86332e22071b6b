"""The short benchmark: one figure per part of the system, in minutes, in one file to keep.

Rollouts and the agent's question are timed as `bench` times them, with fewer branches and repeats.
The environment is timed by gymnax's protocol (Lange 2022, github.com/RobertTLange/gymnax): seconds
per million steps of 2,000 environments under random actions, here from batches of whole episodes.
A small Qwen3 stands for language models: one update and one batch of the embedded sampler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from policy.qwen3.config import Qwen3Config
from policy.qwen3.model import Qwen3
from policy.qwen3.sampler import Draw, generate
from policy.train.data.packing import Rows
from policy.train.loop.learner import Learner
from policy.train.loop.metrics import flops_per_token
from policy.train.loop.optimizer import LearnerConfig
from policy.train.losses import cross_entropy
from sepsis_jax.benchmark.bench import BenchOptions, run_bench, torch_wanted
from sepsis_jax.benchmark.hardware import hardware, jax_products, torch_version
from sepsis_jax.benchmark.jax_runners import QUESTION, environment, environment_steps
from sepsis_jax.benchmark.setup import synthetic_stays
from sepsis_jax.benchmark.timing import Contender, Timed, best, summary, take_turns
from sepsis_jax.benchmark.torch_runners import EAGER
from sepsis_jax.runs import JsonDict, Progress, provenance, silent
from worldmodel.errors import InputError
from worldmodel.models.world_model import WorldModel
from worldmodel.resources import BFLOAT16

BRANCHES = {"cpu": 1024}
_BRANCHES_ACCELERATOR = 65_536
ENVIRONMENTS = 2000
_MILLION = 1e6


@dataclass(frozen=True)
class LanguageModel:
    """A language model to time, and how much it reads and writes.

    Attributes:
      config: of the model.
      rows, length: of an update, full of tokens.
      prompts, prompt, drawn: of a batch of the sampler: rows, tokens read and tokens drawn in each.
    """

    config: Qwen3Config
    rows: int = 1
    length: int = 512
    prompts: int = 8
    prompt: int = 64
    drawn: int = 32


LANGUAGE_MODEL = LanguageModel(
    Qwen3Config(
        vocab_size=32_768, hidden_size=512, intermediate_size=1536, num_hidden_layers=10,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, rope_theta=1e6,
        tie_word_embeddings=True,
    )
)  # fmt: skip
"""A Qwen3 of 48 million parameters."""


@dataclass(frozen=True)
class Figure:
    """One line of the result: the median of the repeats and their range.

    Attributes:
      name: what was measured.
      unit: of the values.
      median, min, max: values.
    """

    name: str
    unit: str
    median: float
    min: float
    max: float


def run_quick(
    world_model: WorldModel, options: BenchOptions, progress: Progress = silent
) -> JsonDict:
    """Measures one figure per part of the system.

    Args:
      world_model: model whose first member is simulated.
      options: of the rollouts and the question, without `branches` those that suit the device;
        `repeats` is of everything.
      progress: called with (phase, share done).

    Returns:
      JSON-ready, without a path of this machine: `figures` (as `Figure`), `options`, `hardware`
      and provenance.

    Raises:
      InputError: `only` names contenders.
    """
    if options.only:
        raise InputError("only: a quick benchmark has contenders of its own; leave out one of both")
    world_model = world_model.member(0)
    others = (EAGER,) if torch_wanted(world_model) else ()
    usual = (BRANCHES.get(jax.default_backend(), _BRANCHES_ACCELERATOR),)
    options = replace(
        options, branches=options.branches or usual, only=("sharded", *others, QUESTION)
    )
    rolled = run_bench(world_model, options, lambda phase, share: progress(phase, share / 2))

    language = LANGUAGE_MODEL
    accelerated = jax.default_backend() != "cpu"
    precision = BFLOAT16 if accelerated else "highest"
    dtype = jnp.bfloat16 if accelerated else jnp.float32
    progress("compiling the environment and the language model", 0.5)
    env = environment(world_model, synthetic_stays(options.seed), each_step=False)
    contenders = [
        environment_steps(env, ENVIRONMENTS),
        train_step(language, dtype),
        sampler_batch(language, dtype),
    ]
    products = jax_products(precision, everywhere=False)
    timed = take_turns(
        [*contenders, *products],
        options.repeats,
        lambda phase, share: progress(phase, 0.5 + share / 2),
    )
    (played, trained, sampled), multiplied = timed[: len(contenders)], timed[len(contenders) :]
    figures = [
        *_rollouts(rolled),
        _figure(f"{played.contender.name}, a million steps", "s", _MILLION / played.rates),
        *_language_model(language, trained, sampled, best(multiplied)),
    ]
    return {
        "figures": [vars(figure) for figure in figures],
        "language_model": {
            **vars(language),
            "config": language.config.to_hf(dtype=jnp.dtype(dtype).name),
        },
        "options": vars(options),
        "hardware": hardware(),
        **provenance(command="sepsis-jax bench --quick", torch=torch_version()),
    }


def train_step(language: LanguageModel, dtype: type[jnp.generic]) -> Contender:
    """An update of all parameters from full rows of random tokens; the work is tokens read.

    Args:
      language: what is trained, and on how much.
      dtype: of products; parameters and moments are float32.
    """
    model = Qwen3(language.config, dtype=dtype, rngs=nnx.Rngs(0))
    learner = Learner(model, partial(cross_entropy, remat="none"), LearnerConfig())
    shape = (1, language.rows, language.length)
    batch = Rows.full(_random_ids(language, shape))

    def run(repeat: int) -> object:
        return jax.block_until_ready(learner.update(batch))

    return Contender("train step", run, math.prod(shape))


def sampler_batch(language: LanguageModel, dtype: type[jnp.generic]) -> Contender:
    """A batch of the embedded sampler, prompts included; the work is tokens drawn.

    Args:
      language: what draws, and how much.
      dtype: of products and parameters.
    """
    model = Qwen3(language.config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    prompts = _random_ids(language, (language.prompts, language.prompt)).tolist()

    def run(repeat: int) -> object:
        seeds = range(repeat * len(prompts), (repeat + 1) * len(prompts))
        return generate(
            model,
            [
                Draw(tuple(prompt), seed, max_completion_length=language.drawn)
                for prompt, seed in zip(prompts, seeds, strict=True)
            ],
        )

    return Contender("sampler", run, language.prompts * language.drawn)


def _random_ids(language: LanguageModel, shape: tuple[int, ...]) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, language.config.vocab_size, shape)
    return ids.astype(np.int32)


def _rollouts(rolled: JsonDict) -> list[Figure]:
    """Throughput, share of the bound, ratio to torch, and the agent's questions."""

    def kept(row: JsonDict, name: str, unit: str, scale: float = 1.0, suffix: str = "") -> Figure:
        values = {key: scale * row[f"{key}{suffix}"] for key in ("median", "min", "max")}
        return Figure(name, unit, **values)

    return [
        *(
            kept(row, f"rollouts, {row['name']}, {row['branches']:,} branches", "branch-steps/s")
            for row in rolled["table"]
        ),
        *(
            kept(row, "rollouts: share of the bound by matrix products", "%", 100.0)
            for row in rolled["bound"]["shares"].values()
        ),
        *(kept(row, f"rollouts: ratio to {name}", "x") for name, row in rolled["ratios"].items()),
        *(
            kept(row, f"{row['name']}, {row['branches']:,} branches", "ms", suffix="_ms")
            for row in rolled["question"]
        ),
    ]


def _language_model(
    language: LanguageModel, trained: Timed, sampled: Timed, peak: Timed
) -> list[Figure]:
    """Tokens per second and model FLOPs utilisation (MFU): model FLOP/s over those of products.

    A token that is read or drawn forwards only takes a third of the FLOPs of training on it.
    """
    training = flops_per_token(language.config, language.length)
    total = language.prompt + language.drawn
    # Per token drawn: its own FLOPs and its share of the prompt's.
    drawing = flops_per_token(language.config, total) / 3 * total / language.drawn
    return [
        _figure("language model, train step", "tokens/s", trained.rates),
        _figure(
            "language model, train step: MFU", "%", 100 * trained.rates * training / peak.rates
        ),
        _figure("language model, sampler", "tokens/s", sampled.rates),
        _figure("language model, sampler: MFU", "%", 100 * sampled.rates * drawing / peak.rates),
        _figure(f"matrix products ({peak.contender.name})", "GFLOP/s", peak.rates / 1e9),
    ]


def _figure(name: str, unit: str, values: np.ndarray | Sequence[float]) -> Figure:
    return Figure(name, unit, **summary(values))
