"""Eight simulated devices, in one process or in two, make the update that one device makes."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from policy.train.loop import distributed
from worldmodel.errors import InputError

SETTING = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from functools import partial
from flax import nnx
from policy import qwen3
from policy.qwen3 import lora
from policy.qwen3.sharding import make_mesh
from policy.train.loop.checkpoints import Checkpoints
from policy.train.data.packing import Rows
from policy.train.loop.learner import Learner
from policy.train.loop.optimizer import LearnerConfig
from policy.train.losses import Summed, cross_entropy

config = LearnerConfig(max_steps=2, learning_rate=1e-4, warmup_steps=0,
                       gradient_accumulation_steps=2, logging_steps=1)
draw = np.random.default_rng(0)
ids = draw.integers(3, 600, (4, 8, 12), np.int32)
positions = np.broadcast_to(np.arange(12, dtype=np.int32), ids.shape)
learned = draw.random(ids.shape) < 0.5
batches = [Rows(*rows) for rows in zip(ids, positions, positions * 0 + 1, learned)]
loss = partial(cross_entropy, remat="full")


def assert_alike(a, b):
    # But for the few whose gradient is next to nothing, of which Adam takes the sign.
    a, b = np.asarray(a), np.asarray(b)
    assert np.mean(np.abs(a - b) > 1e-5) < 1e-3
    np.testing.assert_allclose(a, b, atol=4e-4)


def gradients(learner):
    # Adam's first moment after the first update is a tenth of the (clipped) gradient.
    found = []
    def note(report):
        found.append(jax.device_get(optax.tree.get(learner.state.optimizer, "mu")))
    reports = learner.run(batches, report=note)
    return reports, jax.tree.map(lambda x: x / (1 - config.adam_beta1), found[0])


def model_of(folder, kind, **where):
    model = qwen3.load(folder, **where)
    if kind == "full":
        return model, nnx.Param
    # A second factor that is not zero, so that both get gradients.
    model = lora.add_adapters(model, rank=2, alpha=4.0, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.01, state))
    return model, nnx.LoRAParam
"""

ON_EIGHT_DEVICES = (
    SETTING
    + """
assert jax.device_count() == 8
mesh = make_mesh(data=2, fsdp=2, tensor=2)
for kind in ("full", "lora"):
    model, trainable = model_of(sys.argv[1], kind)
    one = Learner(model, loss, config, trainable=trainable)
    reports, expected = gradients(one)
    split = Learner(model, loss, config, trainable=trainable, mesh=mesh)
    places = jax.tree.map(lambda x: x.sharding, split.state)
    again, found = gradients(split)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected)) > 0.01
    for a, b in zip(again, reports, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, atol=1e-5)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-4)
    assert jax.tree.map(lambda x: x.sharding, split.state) == places
    leaves = jax.tree.leaves((split.state.params, split.state.optimizer))
    largest = max(leaves, key=lambda x: x.size)
    parts = largest.size // largest.addressable_shards[0].data.size
    assert parts == (4 if kind == "full" else 2)
    jax.tree.map(assert_alike, split.state, one.state)

# Rounding does not depend on how arrays lie.
half = LearnerConfig(max_steps=2, warmup_steps=0, param_dtype="bfloat16", moment_dtype="bfloat16")
def constant(model, rows):
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    total = sum(jnp.sum(x.astype(jnp.float32)) for x in params)
    return Summed(total + 0.0 * jnp.sum(rows), jnp.float32(1), {})
model, _ = model_of(sys.argv[1], "full")
ends = []
for mesh in (make_mesh(fsdp=4, tensor=2), None):
    learner = Learner(model, constant, half, mesh=mesh)
    for _ in range(2):
        learner.update(np.ones((1, 8, 1), np.float32))
    ends.append(learner)
for a, b in zip(*(jax.tree.leaves(end.state) for end in ends), strict=True):
    same = np.mean(np.asarray(a) == np.asarray(b))
    assert same > 0.99, same  # the clipped gradient differs in its last bits

# A checkpoint goes on over another mesh, and each array lies where the learner there has it.
checkpoints = Checkpoints(sys.argv[2])
checkpoints.save(2, ends[0].state, {})
for mesh in (None, make_mesh(data=2, fsdp=4)):
    learner = Learner(model, constant, half, mesh=mesh)
    places = jax.tree.map(lambda x: x.sharding, learner.state)
    assert learner.resume(checkpoints) == {} and learner.step == 2
    assert jax.tree.map(lambda x: x.sharding, learner.state) == places
    jax.tree.map(np.testing.assert_array_equal, learner.state, ends[0].state)

try:
    ends[0].update(np.ones((1, 6, 1)))
except Exception as error:
    print(type(error).__name__, error)
"""
)

ONE_OF_TWO = (
    SETTING
    + """
from policy.train.loop.distributed import from_first, is_first, start, wait, whole
from policy.train.loop.metrics import MetricsLog

start()
assert jax.process_count() == int(sys.argv[3]) and jax.device_count() == 4
model, _ = model_of(sys.argv[1], "full")
learner = Learner(model, loss, config, mesh=make_mesh(data=2, fsdp=2))
folder = sys.argv[2]
checkpoints = Checkpoints(folder + "/checkpoints")
with MetricsLog(folder) as log:
    learner.run(batches, report=log.report, checkpoints=checkpoints, extra=lambda: {"n": 1})
batch = (np.arange(6.0, dtype=np.float32).reshape(2, 3), np.array([True, False]), np.int32(-4))
like = (np.zeros((0, 1), np.float32), np.zeros(1, bool), np.int32(0))
for a, b in zip(from_first(batch if is_first() else None, like), batch, strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype
wait("batch")
model = whole(learner.model())
if is_first():
    qwen3.save_hf(model, folder + "/weights", source=sys.argv[1])
saved = whole(learner.state.params)
learner.run([])  # nothing is left to do
assert learner.resume(checkpoints) == {"n": 1}
jax.tree.map(np.testing.assert_array_equal, saved, whole(learner.state.params))
if is_first():
    again = nnx.state(qwen3.load(folder + "/weights"), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, again, saved)
    np.savez(folder + "/end.npz", *jax.tree.leaves(saved))
"""
)


def python(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def finished(processes):
    """The output of each, all of which must end well."""
    try:
        found = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, found, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in found]


def test_eight_devices_make_the_update_of_one(untaught, tmp_path):
    (out,) = finished([python(ON_EIGHT_DEVICES, untaught, tmp_path, JAX_NUM_CPU_DEVICES="8")])
    assert "InputError batch: 6 rows per micro-batch are no multiple of the 4 devices" in out


def test_two_processes_make_the_update_of_one(untaught, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one, two = tmp_path / "one", tmp_path / "two"
    finished([python(ONE_OF_TWO, untaught, one, 1, JAX_NUM_CPU_DEVICES="4")])
    finished(
        [
            python(
                ONE_OF_TWO,
                untaught,
                two,
                2,
                JAX_NUM_CPU_DEVICES="2",
                SEPSIS_JAX_COORDINATOR=f"127.0.0.1:{port}",
                SEPSIS_JAX_PROCESSES="2",
                SEPSIS_JAX_PROCESS=str(number),
            )
            for number in range(2)
        ]
    )
    ends = [np.load(folder / "end.npz") for folder in (one, two)]
    for name in ends[0]:
        difference = np.abs(ends[0][name] - ends[1][name])
        assert np.mean(difference > 1e-5) < 1e-3 and difference.max() < 4e-4
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, two)]
    assert [len(lines) for lines in logs] == [2, 2]  # one line each, not one per process
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv(distributed.COORDINATOR, "127.0.0.1:1")
    with pytest.raises(InputError, match="give all of SEPSIS_JAX_COORDINATOR, SEPSIS_JAX_PROC"):
        distributed.start()
    monkeypatch.setenv(distributed.PROCESSES, "two")
    with pytest.raises(InputError, match="invalid literal"):
        distributed.start(process=0)
    monkeypatch.undo()
    distributed.start()  # alone
