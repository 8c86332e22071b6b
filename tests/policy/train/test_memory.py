"""The memory that is foretold is about what XLA plans, of small models and of Qwen3-4B on TPUs."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from policy.qwen3.config import QWEN3_4B, Qwen3Config
from policy.qwen3.sampler import Settings, _apart, draw_replies, read_prompts
from policy.train.data.packing import Rows
from policy.train.loop import memory
from policy.train.loop.memory import Budget, Model
from policy.train.loop.optimizer import LearnerConfig, initial_state, update
from policy.train.losses import cross_entropy

TPU = json.loads(Path("benchmarks/train_step_tpu.json").read_text())["cases"]
GPU = json.loads(Path("benchmarks/compile_gpu.json").read_text())["updates"]
ONE = (1, 1, 1)


def kind(case):
    return case.get("topology", case.get("card")), case["param_dtype"], case["lora"]


def small(layers=4, vocab=2048, lora=0):
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=256, intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, rope_theta=1e6,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Model(config, "float32", "float32", lora, ONE)


def compiled_update(model, config, rows, length, remat):
    """XLA's plan of an update on one CPU."""
    graphdef = nnx.split(nnx.eval_shape(model.make), model.trainable, ...)[0]
    state = jax.eval_shape(lambda: initial_state(model.trained(), config))
    shape = (config.gradient_accumulation_steps, rows, length)
    kinds = (jnp.int32, jnp.int32, jnp.int32, jnp.bool_)
    batch = Rows(*(jax.ShapeDtypeStruct(shape, kind) for kind in kinds))
    loss = partial(cross_entropy, remat=remat)
    step = jax.jit(partial(update, graphdef, loss, config), donate_argnums=0)
    return step.lower(state, jax.eval_shape(model.frozen), batch).compile().memory_analysis()


@pytest.mark.parametrize(
    ("model", "rows", "length", "remat", "steps"),
    [
        (small(), 4, 512, "full", 2),  # the output projection is the most
        (small(vocab=512), 1, 1024, "full", 1),  # attention is
        (small(), 2, 512, "none", 2),  # the activations of all layers are
        (small(layers=16), 1, 32, "full", 2),  # the gradients are
    ],
)
def test_an_update_takes_what_is_foretold(model, rows, length, remat, steps):
    config = LearnerConfig(gradient_accumulation_steps=steps)
    planned = compiled_update(model, config, rows, length, remat)
    parts = memory.update(model, config, rows=rows, length=length, remat=remat)
    kept = sum(memory.kept(model, config).values())
    assert kept == pytest.approx(planned.argument_size_in_bytes, rel=0.02)  # but for the batch
    assert sum(parts.values()) == pytest.approx(planned.temp_size_in_bytes, rel=0.2), parts


def test_bfloat16_is_rounded_a_layer_at_a_time():
    """All at once took nine float32 copies of the parameters."""
    model = small(layers=16)
    config = LearnerConfig(param_dtype="bfloat16", moment_dtype="bfloat16")
    planned = compiled_update(model, config, 1, 32, "full")
    copy = model.copies(ONE, "float32")
    assert planned.temp_size_in_bytes < 4 * copy
    parts = memory.update(model, config, rows=1, length=32, remat="full", in_place=False)
    assert sum(parts.values()) == pytest.approx(planned.temp_size_in_bytes, rel=0.3), parts


@pytest.mark.parametrize("case", [*TPU, *GPU], ids=lambda case: " ".join(map(str, kind(case))))
def test_qwen3_4b_takes_what_is_foretold(case):
    """As XLA's compilers planned it (`scripts/compile_train_step.py`, `scripts/compile_gpu.py`)."""
    mesh = (case.get("data", 1), case.get("fsdp", 1), case.get("tensor", 1))
    files = "bfloat16" if case["lora"] else "float32"
    model = Model(QWEN3_4B, "bfloat16", files, case["lora"], mesh)
    config = LearnerConfig(
        gradient_accumulation_steps=case["accumulate"],
        param_dtype=case["param_dtype"],
        moment_dtype=case["param_dtype"],
    )
    kept = memory.kept(model, config)
    parts = memory.update(
        model, config, rows=case["rows"], length=case["length"], remat=case["remat"]
    )
    planned = case["bytes"]
    assert sum(kept.values()) == pytest.approx(planned["arguments"], rel=0.01)
    assert sum(parts.values()) == pytest.approx(planned["temporaries"], rel=0.1)


@pytest.mark.parametrize(("rows", "prompt", "new"), [(16, 256, 64), (2, 1024, 32), (8, 1024, 64)])
def test_sampling_takes_what_is_foretold(rows, prompt, new):
    model = small()
    shapes = jax.eval_shape(lambda: nnx.split(model.make())[1])
    graphdef = nnx.graphdef(nnx.eval_shape(model.make))
    layers = jax.eval_shape(partial(_apart, graphdef), shapes)
    floats, ints = jnp.zeros(rows), jnp.zeros(rows, jnp.int32)
    settings = Settings(
        length=ints, limit=ints, seed=jnp.zeros((rows, 2), jnp.uint32), temperature=floats,
        top_p=None, stop_ids=jnp.zeros(8, jnp.int32),
    )  # fmt: skip
    ids = jnp.zeros((rows, prompt), jnp.int32)
    read = read_prompts.lower(graphdef, shapes, layers, ids, ints, ints, slots=prompt + new)
    last, cache = read.out_info
    draw = draw_replies.lower(graphdef, shapes, layers, settings, last, cache, most=new)
    at_most = max(
        lowered.compile().memory_analysis().temp_size_in_bytes for lowered in (read, draw)
    )
    parts = memory.sampling(
        model, ONE, rows=rows, prompt=prompt, new=new, cache_tokens=0, on_cpu=True
    )
    assert parts["key-value cache"] == _size(cache)
    assert model.layers(ONE) == _size(layers)
    assert sum(parts.values()) == pytest.approx(_size(cache) + at_most, rel=0.2), parts


def test_shorter_prompts_never_take_more():
    model = Model(QWEN3_4B, "bfloat16", "bfloat16", 0, ONE)
    found = [
        memory.sampling(model, ONE, rows=16, prompt=prompt, new=64, cache_tokens=0)
        for prompt in (1024, 1536, 2048, 3072, 4096, 8192)
    ]
    reading = [parts["reading prompts"] for parts in found]
    assert reading == sorted(reading)


def _size(shapes):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def test_a_bound_on_the_cache_bounds_the_budget():
    sizes = dict(rows=256, prompt=8192, new=1024)
    model = Model(QWEN3_4B, "bfloat16", "bfloat16", 0, ONE)
    free = memory.sampling(model, ONE, **sizes, cache_tokens=0)
    bound = memory.sampling(model, ONE, **sizes, cache_tokens=2**17)
    assert free["key-value cache"] == 256 * 9216 * 147_456  # bytes per token of Qwen3-4B
    assert bound["key-value cache"] == 2**17 * 147_456


def test_phases_that_overlap_add_up():
    phases = {"learning": {"a": 5}, "sampling": {"b": 3}}
    assert Budget({"c": 1}, phases).peak == 6 + memory.RESERVE
    assert Budget({"c": 1}, phases, together=True).peak == 9 + memory.RESERVE


def test_adapters_need_neither_moments_nor_gradients_of_the_rest():
    full, lora = (Model(QWEN3_4B, "bfloat16", "bfloat16", rank, ONE) for rank in (0, 16))
    config = LearnerConfig()
    assert memory.kept(lora, config)["frozen weights"] == full.weights(ONE)
    for part in ("adapters", "moments of adapters"):
        assert memory.kept(lora, config)[part] < full.weights(ONE) / 20
    small_, large = (
        sum(memory.update(model, config, rows=1, length=8192, remat="full").values())
        for model in (lora, full)
    )
    assert small_ < large / 2
    assert np.isfinite(small_)
