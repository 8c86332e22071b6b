"""Batched generation: one jitted call reads the prompts and draws until every row is done.

A row's draws depend on its prompt, its seed and the position of each token alone, so they are
the same in every batch, however padded (up to the rounding of the products).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from policy.qwen3.logprobs import chunked_logprobs
from policy.qwen3.model import Cache, Caches, Qwen3
from policy.qwen3.prefix_cache import PrefixCache
from policy.qwen3.sharding import constrain
from worldmodel.errors import InputError
from worldmodel.resources import bucket

ArrayT = TypeVar("ArrayT")  # lists or NumPy arrays before, JAX arrays inside a jitted function

SMALLEST_BUCKET = 32
PREFILL_TOKENS = 2**15
"""Tokens of prompts that are read at once; longer batches are read in parts of equal width."""


@dataclass(frozen=True)
class Draw:
    """How one row is drawn."""

    prompt_ids: tuple[int, ...]
    seed: int = 0
    temperature: float = 1.0  # 0 takes the most probable token
    top_p: float = 1.0  # the least set of most probable tokens with this mass is drawn from
    max_completion_length: int = 128


@dataclass(frozen=True)
class Drawn:
    """What was drawn after one prompt."""

    token_ids: tuple[int, ...]  # with the stop token that ended them, if one did
    logprobs: tuple[float, ...]  # under the distribution drawn from; 0 at temperature 0
    model_logprobs: tuple[float, ...]  # under the model's own, at temperature 1
    stopped: bool  # by a stop token, not by the limit


def generate(
    model: Qwen3,
    draws: Sequence[Draw],
    *,
    stop_ids: Sequence[int] = (),
    min_rows: int = 1,
    mesh: Mesh | None = None,
    prefixes: PrefixCache | None = None,
    layers: Layers | None = None,
) -> list[Drawn]:
    """Draws tokens after each prompt until a stop token or the limit.

    One program that reads and one that draws are compiled per number of rows and most new tokens,
    rounded up to powers of two, per what is read and the slots of the cache, of which there are two
    sizes each per power of two, and per whether any row has a `top_p` below 1. A limit beyond the
    model's positions is lowered to what they allow.

    Args:
      model: the model.
      draws: any number of rows, at least one.
      stop_ids: tokens that end a row, such as the end of a turn or of a tool call.
      min_rows: fewer are filled up to as many, which saves programs where batches vary in size.
      mesh: that the model is laid out over; rows are split over its data and fsdp axes, and with
        them the cache.
      prefixes: where it has the beginnings of all prompts in one batch, only what is new is read,
        and it keeps what this batch reads and draws; of the same model and mesh.
      layers: of the model, as `layers_apart` gives them, for several calls; made if not given.

    Raises:
      InputError: a prompt is empty, holds unknown ids, or leaves no room in the model's
        positions; or a temperature, top_p or limit has no meaning.
    """
    for draw in draws:
        _check(draw, model)
    context = model.config.max_position_embeddings
    rows = _on_all(bucket(len(draws), min_rows), mesh)
    length = np.ones(rows, np.int32)
    length[: len(draws)] = [len(draw.prompt_ids) for draw in draws]
    limit = np.zeros(rows, np.int32)  # rows that fill the batch are done before they begin
    limit[: len(draws)] = [
        min(draw.max_completion_length, context - len(draw.prompt_ids)) for draw in draws
    ]
    most = bucket(int(limit.max()), SMALLEST_BUCKET)
    width = _slots(int(length.max()), context)
    slots = most + width
    start = np.zeros(rows, np.int32)
    begun: Caches | None = None
    known = None if prefixes is None else prefixes.find([draw.prompt_ids for draw in draws])
    if known is not None:
        width = _slots(int((length[: len(draws)] - known.lengths).max()), context)
        # Where another row has more to read, some tokens are read again instead of padding.
        start[: len(draws)] = np.minimum(known.lengths, slots - width)
        source = np.zeros(rows, np.int32)
        source[: len(draws)] = known.rows
        with _within(mesh):
            begun = _taken(known.cache, source, slots=slots)
    ids = np.zeros((rows, width), np.int32)
    for row, draw in enumerate(draws):
        ids[row, : length[row] - start[row]] = draw.prompt_ids[start[row] :]
    fill = [Draw((0,))] * (rows - len(draws))
    seeds = np.array([draw.seed % 2**64 for draw in [*draws, *fill]], np.uint64)
    settings = Settings(
        length=length,
        limit=limit,
        seed=np.stack([seeds % 2**32, seeds >> 32], axis=-1).astype(np.uint32),
        temperature=np.array([draw.temperature for draw in [*draws, *fill]], np.float32),
        top_p=(
            np.array([draw.top_p for draw in [*draws, *fill]], np.float32)
            if any(draw.top_p < 1 for draw in draws)
            else None
        ),
        stop_ids=np.array(
            [*stop_ids, *[-1] * (bucket(len(stop_ids), 8) - len(stop_ids))], np.int32
        ),
    )
    with _within(mesh):
        graphdef, state = nnx.split(model)
        layers = layers_apart(model) if layers is None else layers
        last, cache = read_prompts(graphdef, state, layers, ids, start, length, begun, slots=slots)
        now = draw_replies(graphdef, state, layers, settings, last, cache, most=most)
        out = jax.device_get(now._replace(cache=()))
    drawn = [_of_row(out, row) for row in range(len(draws))]
    if prefixes is not None:  # all but the last token were read
        every = zip(draws, drawn, strict=True)
        prefixes.keep([(*a.prompt_ids, *b.token_ids)[:-1] for a, b in every], now.cache)
    return drawn


def _on_all(rows: int, mesh: Mesh | None) -> int:
    """Rows that divide over a mesh, at least as many as given."""
    share = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // share) * share


def _slots(tokens: int, context: int) -> int:
    return min(bucket(tokens, SMALLEST_BUCKET, digits=2), context)


Layers = list[object]
"""Parameters as of `Qwen3.apart`."""


def layers_apart(model: Qwen3) -> Layers | None:
    """Parameters of each layer in arrays of their own, a second copy; None but on CPUs.

    CPUs would copy what they read out of arrays of all layers, for every token.
    """
    graphdef, state = nnx.split(model)
    leaf = jax.tree.leaves(state)[0]
    devices = leaf.devices() if isinstance(leaf, jax.Array) else jax.local_devices()
    if any(device.platform != "cpu" for device in devices):
        return None
    apart: Layers = _apart(graphdef, state)
    return apart


def _within(mesh: Mesh | None) -> AbstractContextManager[object]:
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


class Settings(NamedTuple, Generic[ArrayT]):
    """How the rows of a batch are drawn."""

    length: ArrayT  # [B] of the prompt
    limit: ArrayT  # [B]
    seed: ArrayT  # [B, 2] uint32
    temperature: ArrayT  # [B]
    top_p: ArrayT | None  # [B], or None where every row draws from all tokens
    stop_ids: ArrayT  # [K], filled up with -1


class _State(NamedTuple):
    token: jax.Array  # [B] last drawn
    drawn: jax.Array  # [B] how many so far
    stopped: jax.Array  # [B]
    cache: Caches
    tokens: jax.Array  # [B, N]
    logprobs: jax.Array  # [B, N]
    model_logprobs: jax.Array  # [B, N]


@partial(jax.jit, static_argnames="slots")
def _taken(kept: Caches, rows: jax.Array, *, slots: int) -> Caches:
    """The cache of some rows [B], with as many slots as are needed now."""

    def one(x: jax.Array, axis: int) -> jax.Array:  # [L, B, K, ...], slots along the axis
        x = jax.lax.slice_in_dim(x[:, rows], 0, min(slots, x.shape[axis]), axis=axis)
        more = [(0, 0)] * x.ndim
        more[axis] = (0, slots - x.shape[axis])
        return constrain(jnp.pad(x, more), None, "batch", "heads", None, None)

    def resized(cache: Cache) -> Cache:
        return Cache(one(cache.k, 4), one(cache.v, 3))

    return resized(kept) if isinstance(kept, Cache) else tuple(map(resized, kept))


@partial(jax.jit, static_argnames="graphdef")
def _apart(graphdef: nnx.GraphDef[Qwen3], state: object) -> Layers:
    model: Qwen3 = nnx.merge(graphdef, state)
    return model.apart()


@partial(jax.jit, static_argnames=("graphdef", "most"), donate_argnames="cache")
def draw_replies(
    graphdef: nnx.GraphDef[Qwen3],
    state: object,
    layers: Layers | None,
    settings: Settings[jax.Array],
    last: jax.Array,
    cache: Caches,
    *,
    most: int,
) -> _State:
    """Draws after prompts that were read, whose last hidden states are `last` [B, D]."""
    model: Qwen3 = nnx.merge(graphdef, state)
    batch = len(last)

    def draw(hidden: jax.Array, step: jax.Array, now: _State) -> _State:
        token, logprob, model_logprob = jax.vmap(draw_token)(
            model.logits(hidden),
            settings.seed,
            settings.length + step,
            settings.temperature,
            settings.top_p,
        )
        going = ~now.stopped & (step < settings.limit)
        return _State(
            token=token,
            drawn=now.drawn + going,
            stopped=now.stopped | (going & (token[:, None] == settings.stop_ids).any(-1)),
            cache=now.cache,
            tokens=now.tokens.at[:, step].set(token),
            logprobs=now.logprobs.at[:, step].set(logprob),
            model_logprobs=now.model_logprobs.at[:, step].set(model_logprob),
        )

    def unfinished(carry: tuple[jax.Array, _State]) -> jax.Array:
        step, now = carry
        return jnp.any(~now.stopped & (step < settings.limit))

    def advance(carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
        step, now = carry
        at = settings.length + step - 1
        hidden, cache = model.extend(now.token[:, None], at, now.cache, layers)
        return step + 1, draw(hidden[:, 0], step, now._replace(cache=cache))

    none = jnp.zeros(batch, jnp.int32)
    blank = jnp.zeros((batch, most), jnp.float32)
    now = _State(none, none, none.astype(bool), cache, blank.astype(jnp.int32), blank, blank)
    now = draw(last, jnp.int32(0), now)
    _, now = jax.lax.while_loop(unfinished, advance, (jnp.int32(1), now))
    return now


def prefill_width(rows: int, width: int) -> int:
    """Columns of prompts [rows, width] that are read at once, which divide the width."""
    if rows * width <= PREFILL_TOKENS:
        return width
    part = 1 << (max(PREFILL_TOKENS // rows, SMALLEST_BUCKET).bit_length() - 1)
    part = min(part, width & -width)  # the largest power of two that divides it
    return part if part >= SMALLEST_BUCKET else width


@partial(jax.jit, static_argnames=("graphdef", "slots"), donate_argnames="begun")
def read_prompts(
    graphdef: nnx.GraphDef[Qwen3],
    state: object,
    layers: Layers | None,
    ids: jax.Array,
    begin: jax.Array,
    length: jax.Array,
    begun: Caches | None = None,
    *,
    slots: int,
) -> tuple[jax.Array, Caches]:
    """Reads what is new of prompts, [B, T], part by part.

    Returns:
      Hidden states [B, D] of the last tokens, and the cache.
    """
    model: Qwen3 = nnx.merge(graphdef, state)
    batch, width = ids.shape
    part = prefill_width(batch, width)

    def more(number: jax.Array, carry: tuple[jax.Array, Caches]) -> tuple[jax.Array, Caches]:
        last, cache = carry
        start = number * part
        columns = jax.lax.dynamic_slice_in_dim(ids, start, part, axis=1)
        hidden, cache = model.extend(columns, begin + start, cache, layers)
        at = length - 1 - begin - start
        here = (at >= 0) & (at < part)
        found = jnp.take_along_axis(hidden, jnp.clip(at, 0, part - 1)[:, None, None], axis=1)
        return jnp.where(here[:, None], found[:, 0], last), cache

    empty = model.empty_cache if layers is None else model.empty_caches
    none = jnp.zeros((batch, model.config.hidden_size), model.dtype)
    carry: tuple[jax.Array, Caches] = (none, empty(batch, slots) if begun is None else begun)
    if part == width:
        return more(jnp.int32(0), carry)
    result: tuple[jax.Array, Caches] = jax.lax.fori_loop(0, width // part, more, carry)
    return result


def draw_token(
    logits: Float[Array, " V"],
    seed: Shaped[Array, " 2"],
    position: Int[Array, ""],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token.

    Args:
      logits: [V] float32.
      seed: [2] uint32, low and high.
      position: [] int; where the token will stand.
      temperature: []; 0 takes the most probable token.
      top_p: []; all tokens may be drawn if not given.

    Returns:
      The token, its log-probability under the distribution drawn from, and under the model's own.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), position)
    greedy = temperature == 0
    tempered = logits / jnp.where(greedy, 1.0, temperature)
    allowed = tempered
    if top_p is not None:
        allowed = jnp.where(nucleus(jax.nn.softmax(tempered), top_p), tempered, -jnp.inf)
    noisy = allowed + jnp.where(greedy, 0.0, jax.random.gumbel(key, logits.shape))
    token = jnp.argmax(noisy).astype(jnp.int32)
    logprob = jnp.where(greedy, 0.0, allowed[token] - jax.nn.logsumexp(allowed))
    return token, logprob, jax.nn.log_softmax(logits)[token]


def nucleus(probs: Float[Array, " V"], top_p: Float[Array, ""]) -> Bool[Array, " V"]:
    """[V] bool: the least set of most probable tokens whose mass reaches `top_p`.

    Equally probable tokens at its edge are all in. The edge is found by bisection over the bits
    of positive floats, which are ordered as the floats are: 31 sums instead of a sort.

    Args:
      probs: [V] float32.
      top_p: []; at 0 only the most probable remain, at 1 all do.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        enough = jnp.sum(jnp.where(bits >= middle, probs, 0.0)) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    edge, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), bits.max()))
    return bits >= jnp.where(top_p < 1, edge, 0)


def _of_row(out: _State, row: int) -> Drawn:
    kept = slice(int(out.drawn[row]))
    return Drawn(
        token_ids=tuple(out.tokens[row, kept].tolist()),
        logprobs=tuple(out.logprobs[row, kept].tolist()),
        model_logprobs=tuple(out.model_logprobs[row, kept].tolist()),
        stopped=bool(out.stopped[row]),
    )


def _check(draw: Draw, model: Qwen3) -> None:
    config = model.config
    count = len(draw.prompt_ids)
    if not 0 < count < config.max_position_embeddings:
        raise InputError(
            f"prompt of {count} tokens: expected 1 to {config.max_position_embeddings - 1}, "
            "one less than the model's positions"
        )
    if not (min(draw.prompt_ids) >= 0 and max(draw.prompt_ids) < config.vocab_size):
        raise InputError(f"prompt: token ids must be 0 to {config.vocab_size - 1}")
    if not (draw.temperature >= 0 and 0 <= draw.top_p <= 1 and draw.max_completion_length > 0):
        raise InputError(
            f"temperature {draw.temperature}, top_p {draw.top_p}, max_completion_length "
            f"{draw.max_completion_length}: expected at least 0, 0 to 1, at least 1"
        )


TOKENS_PER_ROW = 1024
"""Continuations beyond this many tokens get a further copy of their prompt."""


Question = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A prompt and its continuations."""


def score(
    model: Qwen3, questions: Sequence[Question], *, mesh: Mesh | None = None
) -> list[list[float]]:
    """Summed log-probability of each continuation after its prompt, at temperature 1.

    A row of the batch holds a prompt and, packed after it as segments of their own, its
    continuations: each sees the prompt and itself. Shapes are rounded up to powers of two.

    Args:
      model: the model.
      questions: prompts with their continuations.
      mesh: as for `generate`.

    Raises:
      InputError: a prompt is empty, or ids are unknown.
    """
    vocab = model.config.vocab_size
    for prompt, continuations in questions:
        if not len(prompt):
            raise InputError("prompt: expected at least one token before a continuation")
        if not all(0 <= token < vocab for part in (prompt, *continuations) for token in part):
            raise InputError(f"prompt or continuation: token ids must be 0 to {vocab - 1}")
    rows = [_pack(prompt, part) for prompt, all_ in questions for part in _groups(all_)]
    if not rows:
        return [[] for _ in questions]
    batch = _stack(rows, mesh)
    with _within(mesh):
        found = iter(np.asarray(_logprobs(*nnx.split(model), batch)))
    scores: list[list[float]] = []
    for _, continuations in questions:
        scores.append([])
        for part in _groups(continuations):
            logprobs = next(found)
            ends = np.cumsum([0, *map(len, part)])
            scores[-1] += [float(logprobs[a:b].sum()) for a, b in pairwise(ends)]
    return scores


class _Row(NamedTuple, Generic[ArrayT]):
    ids: ArrayT  # [T]
    position: ArrayT  # [T]
    segment: ArrayT  # [T]; 1 for the prompt, then one per continuation, 0 for padding
    before: ArrayT  # [N] index of the token before each token of a continuation
    target: ArrayT  # [N]


def _groups(continuations: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    groups: list[list[Sequence[int]]] = []
    filled = 0
    for continuation in continuations:
        if not groups or filled + len(continuation) > TOKENS_PER_ROW:
            groups.append([])
            filled = 0
        groups[-1].append(continuation)
        filled += len(continuation)
    return groups


def _pack(prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> _Row[list[int]]:
    length = len(prompt)
    ids, position, segment = list(prompt), list(range(length)), [1] * length
    before: list[int] = []
    for number, continuation in enumerate(continuations, 2):
        start = len(ids)
        before += [length - 1, *range(start, start + len(continuation) - 1)][: len(continuation)]
        ids += continuation
        position += range(length, length + len(continuation))
        segment += [number] * len(continuation)
    return _Row(ids, position, segment, before, ids[length:])


def _stack(rows: Sequence[_Row[list[int]]], mesh: Mesh | None) -> _Row[np.ndarray]:
    def padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
        width = bucket(max(map(len, lists)), SMALLEST_BUCKET, digits=3)
        out = np.zeros((_on_all(bucket(len(lists)), mesh), width), np.int32)
        for row, values in zip(out, lists, strict=False):
            row[: len(values)] = values
        return out

    return _Row(*(padded(lists) for lists in zip(*rows, strict=True)))


@partial(jax.jit, static_argnames="graphdef")
def _logprobs(graphdef: nnx.GraphDef[Qwen3], state: object, batch: _Row[jax.Array]) -> jax.Array:
    model: Qwen3 = nnx.merge(graphdef, state)
    hidden = model.hidden(
        batch.ids, positions=batch.position, segments=batch.segment, shared=batch.segment == 1
    )
    before = jnp.take_along_axis(hidden, batch.before[..., None], axis=1)
    return chunked_logprobs(before, model.head(), batch.target).logprob
