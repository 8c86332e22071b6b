"""Generator in this process: the JAX sampler as a `Generator`.

Requests of many dialogues that wait at the same time are answered in one batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from policy.qwen3.config import load_stop_ids
from policy.qwen3.model import Qwen3
from policy.qwen3.prefix_cache import PrefixCache
from policy.qwen3.sampler import (
    SMALLEST_BUCKET,
    Draw,
    Layers,
    Question,
    generate,
    layers_apart,
    score,
)
from policy.qwen3.sharding import shard
from policy.qwen3.weights import load
from policy.serving.backend import (
    LENGTH,
    STOP,
    BackendError,
    Batcher,
    Completion,
    ContextError,
    Lockstep,
    Sampling,
)
from worldmodel.resources import bucket

S = TypeVar("S")
T = TypeVar("T")


class _Weights(NamedTuple):
    model: Qwen3 | None  # None between two versions
    version: str | None
    layers: Layers | None  # of this version, apart
    prefixes: PrefixCache | None  # of this version


class _Kind(NamedTuple):
    """Draws of one kind are in one batch."""

    slots: tuple[int, int]  # of the cache, for the prompt and for new tokens
    source: int | None  # batch that has the beginning of the prompt


class EmbeddedGenerator:
    """A `Generator` over `policy.qwen3.sampler`.

    Args:
      model: a Qwen3.
      stop_ids: tokens that end a completion.
      name: for records.
      version: of the weights.
      min_batch, max_batch: rows of a batch; powers of two. Smaller ones are padded; equal
        numbers need one compiled program per width, and compute idle rows.
      cache_tokens: tokens that the cache of keys and values holds at most, new ones and padding
        included; batches of long prompts have fewer rows, and prompts of which it holds none are
        refused. 0 for no limit.
      prefix_rows: rows whose keys and values are kept after they were drawn, so that the next turn
        of a dialogue reads only what is new; the cache takes so many rows more. 0 for none.
      max_wait: seconds that a first request waits for others.
      lockstep: shared with the pool; batches then start by its rule and `max_wait` is not used.
      mesh: that the model is laid out over; rows are split over it too.
    """

    def __init__(
        self,
        model: Qwen3,
        *,
        stop_ids: Sequence[int],
        name: str = "embedded",
        version: str | None = None,
        min_batch: int = 1,
        max_batch: int = 64,
        cache_tokens: int = 0,
        prefix_rows: int = 0,
        max_wait: float = 0.005,
        lockstep: Lockstep | None = None,
        mesh: Mesh | None = None,
    ):
        self.name = name
        self.stop_ids = tuple(stop_ids)
        self.min_batch, self._max_batch, self._cache_tokens = min_batch, max_batch, cache_tokens
        self._config, self._mesh = model.config, mesh
        self._prefix_rows = prefix_rows
        self._weights = self._with_prefixes(model, version)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedded-qwen3")
        batcher = partial(
            Batcher,
            thread=self._thread,
            max_wait_s=max_wait,
            one_by_one=True,
            lockstep=lockstep,
        )
        self._draws: Batcher[Draw, Completion] = batcher(
            _as_backend_error(self._draw), kind=self._kind, capacity=self._rows
        )
        self._scores: Batcher[Question, list[float]] = batcher(
            _as_backend_error(self._score), kind=_width_of_question, capacity=max_batch
        )

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        **settings: Any,  # settings of the generator, passed on as they are
    ) -> EmbeddedGenerator:
        """A generator from a Hugging Face folder, with its end-of-sequence tokens as stop tokens.

        Args:
          folder, dtype, param_dtype: as for `qwen3.load`.
          settings: of the class; the name is the folder unless given.

        Raises:
          InputError: as `qwen3.load`, or the folder names no end-of-sequence token.
        """
        settings = {"stop_ids": load_stop_ids(folder), "name": str(folder)} | settings
        return cls(load(folder, dtype=dtype, param_dtype=param_dtype), **settings)

    def set_weights(self, model: Qwen3, version: str | None) -> None:
        """Sets the weights of all later batches; a running batch keeps the old ones.

        On CPUs those of the layers are held twice, see `layers_apart`.
        """
        graphdef, state = nnx.split(model)
        state = jax.device_put(state) if self._mesh is None else shard(state, self._mesh)
        self._weights = self._with_prefixes(nnx.merge(graphdef, state), version)

    def release_weights(self) -> None:
        """Lets go of the weights, so that new ones take their memory; asked before, it fails."""
        self._weights = _Weights(None, None, None, None)

    async def generate(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, seed: int
    ) -> Completion:
        """Draws tokens until one of the stop tokens or the limit.

        Raises:
          ContextError: the prompt leaves no room in the model's positions, or in the cache.
          BackendError: the device failed.
        """
        context = self._config.max_position_embeddings
        if len(prompt_ids) >= context:
            raise ContextError(f"a prompt of {len(prompt_ids)} tokens, of a context of {context}")
        draw = Draw(
            prompt_ids=tuple(prompt_ids),
            seed=seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_completion_length=sampling.max_completion_length,
        )
        slots = sum(_slots_of_draw(draw))
        if 0 < self._cache_tokens < slots:
            raise ContextError(
                f"a prompt of {len(prompt_ids)} tokens takes {slots} of a cache of "
                f"{self._cache_tokens}"
            )
        return await self._draws.ask(draw)

    async def score(
        self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """Summed log-probability of each continuation after the prompt, at temperature 1.

        Raises:
          BackendError: the prompt does not fit the model, or the device failed.
        """
        return await self._scores.ask((tuple(prompt_ids), [tuple(part) for part in continuations]))

    async def close(self) -> None:
        """Waits for the batch under way; requests that still wait are refused."""
        closed = BackendError("the generator is closed")
        self._draws.refuse(closed)
        self._scores.refuse(closed)
        await asyncio.to_thread(self._thread.shutdown)

    def _draw(self, draws: Sequence[Draw]) -> list[Completion]:
        model, weights = self._served()
        found = generate(
            model, draws, stop_ids=self.stop_ids, mesh=self._mesh,
            prefixes=weights.prefixes, layers=weights.layers,
            min_rows=min(self.min_batch, self._rows(self._kind(draws[0]))),
        )  # fmt: skip
        return [
            Completion(
                token_ids=drawn.token_ids,
                logprobs=drawn.logprobs,
                finish_reason=STOP if drawn.stopped else LENGTH,
                weight_version=weights.version,
            )
            for drawn in found
        ]

    def _score(self, questions: Sequence[Question]) -> list[list[float]]:
        return score(self._served()[0], questions, mesh=self._mesh)

    def _kind(self, draw: Draw) -> _Kind:
        prefixes = self._weights.prefixes
        return _Kind(
            _slots_of_draw(draw),
            None if prefixes is None else prefixes.number_of(draw.prompt_ids),
        )

    def _rows(self, kind: Hashable) -> int:
        """Rows of a batch at most, a power of two, for draws of a kind."""
        assert isinstance(kind, _Kind)
        fitting = self._cache_tokens // sum(kind.slots) if self._cache_tokens else self._max_batch
        return min(self._max_batch, 1 << (max(fitting, 1).bit_length() - 1))

    def _with_prefixes(self, model: Qwen3, version: str | None) -> _Weights:
        prefixes = PrefixCache(self._prefix_rows) if self._prefix_rows else None
        return _Weights(model, version, layers_apart(model), prefixes)

    def _served(self) -> tuple[Qwen3, _Weights]:
        weights = self._weights
        if weights.model is None:
            raise BackendError("the generator has no weights: the next ones are not there yet")
        return weights.model, weights


def _as_backend_error(answer: Callable[[S], T]) -> Callable[[S], T]:
    """Wraps a function so that every exception becomes a `BackendError`."""

    def wrapped(asked: S) -> T:
        try:
            return answer(asked)
        except Exception as error:  # passed on to the dialogues
            raise BackendError(f"{type(error).__name__}: {error}") from error

    return wrapped


def _slots_of_draw(draw: Draw) -> tuple[int, int]:
    """Slots of the cache for the prompt and for new tokens."""
    return (
        bucket(len(draw.prompt_ids), SMALLEST_BUCKET),
        bucket(draw.max_completion_length, SMALLEST_BUCKET),
    )


def _width_of_question(question: Question) -> int:
    prompt, continuations = question
    return bucket(len(prompt) + sum(map(len, continuations)), SMALLEST_BUCKET)
