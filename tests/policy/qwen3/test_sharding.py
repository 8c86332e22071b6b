"""Eight simulated devices compute what one does, and hold their share of the bytes."""

import os
import subprocess
import sys

import pytest
from jax.sharding import PartitionSpec

from policy.qwen3.sharding import param_spec

ON_EIGHT_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from policy import qwen3
from policy.qwen3 import lora, sharding
from policy.qwen3.logprobs import token_logprobs
from policy.qwen3.prefix_cache import PrefixCache
from policy.qwen3.sampler import Draw, generate

assert jax.device_count() == 8
folder = sys.argv[1]
ids = np.random.default_rng(0).integers(0, 640, (8, 12))


def loss(graphdef, state, ids):
    return token_logprobs(nnx.merge(graphdef, state), ids, remat="dots").logprob.mean()


step = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
one = qwen3.load(folder)
value, gradient = step(*nnx.split(one), ids)
forward = nnx.jit(qwen3.logits)
expected = forward(one, ids)
draws = [Draw((5, 6, 7), seed=seed, max_completion_length=4) for seed in range(8)]
drawn = generate(one, draws)
for shape in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    mesh = sharding.make_mesh(**shape)
    sharding.check_divisible(one.config, mesh)
    model = qwen3.load(folder, mesh=mesh)
    kernel = model.layers.mlp.up_proj.kernel[...]
    parts = shape["fsdp"] * shape.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size * parts == kernel.size
    with jax.set_mesh(mesh):
        rows = jax.device_put(ids, sharding.batch_sharding(mesh))
        np.testing.assert_allclose(forward(model, rows), expected, atol=1e-4)

    def params():
        return nnx.state(nnx.merge(*nnx.split(one)), nnx.Param)

    def moments():
        return optax.adamw(1e-3).init(params())

    size = sharding.bytes_per_device(sharding.abstract(params, mesh))
    sharded = nnx.state(model, nnx.Param)
    assert size == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(sharded))
    whole = sum(x.nbytes for x in jax.tree.leaves(sharded))
    assert whole / parts < size < 1.05 * whole / parts  # norms lie on every device
    of_moments = sharding.bytes_per_device(sharding.abstract(moments, mesh))
    assert of_moments == 2 * size + 4  # and the count of steps

with jax.set_mesh(mesh):  # of all three axes
    found, sharded = step(*nnx.split(model), rows)
    assert [d.token_ids for d in generate(model, draws)] == [d.token_ids for d in drawn]

prefixes = PrefixCache(rows=16)
generate(model, draws, mesh=mesh, prefixes=prefixes)
turns = [
    Draw((*a.prompt_ids, *b.token_ids, 9), seed=a.seed, max_completion_length=4)
    for a, b in zip(draws, drawn)
]
assert prefixes.find([draw.prompt_ids for draw in turns]) is not None
second = generate(model, turns, mesh=mesh, prefixes=prefixes)
assert [d.token_ids for d in second] == [d.token_ids for d in generate(one, turns)]

np.testing.assert_allclose(found, value, atol=1e-5)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), sharded, gradient)

made = sharding.init_sharded(
    lambda: lora.add_adapters(
        qwen3.Qwen3(one.config, rngs=nnx.Rngs(0)), rank=8, alpha=8.0, rngs=nnx.Rngs(1)
    ),
    mesh,
)
adapter = made.layers.self_attn.q_proj.adapter
assert adapter.a[...].addressable_shards[0].data.shape == (2, 64, 8)
assert adapter.b[...].addressable_shards[0].data.shape == (2, 8, 128)
scale = float(made.layers.mlp.up_proj.kernel[...].std())
assert abs(scale - one.config.initializer_range) < 0.1 * one.config.initializer_range
"""


def test_eight_devices_compute_what_one_does(folder):
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("path", "ndim", "spec"),
    [
        (("embed_tokens", "embedding"), 2, PartitionSpec("tensor", "fsdp")),
        (("lm_head", "kernel"), 2, PartitionSpec("fsdp", "tensor")),
        (("layers", "self_attn", "q_proj", "kernel"), 3, PartitionSpec(None, "fsdp", "tensor")),
        (("0", "mu", "mlp", "down_proj", "kernel"), 3, PartitionSpec(None, "tensor", "fsdp")),
        (("mlp", "up_proj", "adapter", "a"), 3, PartitionSpec(None, "fsdp", None)),
        (("mlp", "up_proj", "adapter", "b"), 3, PartitionSpec(None, None, "tensor")),
        (("layers", "input_layernorm", "scale"), 2, PartitionSpec()),
        (("0", "count"), 0, PartitionSpec()),
    ],
)
def test_rules(path, ndim, spec):
    assert param_spec(path, ndim) == spec


def test_memory_of_the_real_figures():
    done = subprocess.run(
        [sys.executable, "scripts/qwen3_memory.py", "--size", "4b", "--meshes", "8x1,4x2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "4,022,468,096 parameters" in done.stdout
    assert "| 8 x 1 | 1.87 | 1.87 | 3.75 | 7.49 |" in done.stdout
    done = subprocess.run(
        [sys.executable, "scripts/qwen3_memory.py", "--meshes", "1x16"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("num_key_value_heads 8 is no multiple of the 16 devices")
