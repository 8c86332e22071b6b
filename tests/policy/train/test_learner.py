"""The loop: one update beside Optax by hand, accumulation, frozen parts, and how it stops."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from policy import qwen3
from policy.qwen3.lora import add_adapters
from policy.train.data.packing import Dialogue, batches, pack
from policy.train.loop.checkpoints import Checkpoints
from policy.train.loop.learner import Learner, cast
from policy.train.loop.optimizer import LearnerConfig, schedule
from policy.train.losses import Summed, cross_entropy
from worldmodel.errors import InputError

CONFIG = LearnerConfig(max_steps=4, learning_rate=1e-2, warmup_steps=0, logging_steps=2)


@pytest.fixture(scope="module")
def model(untaught):
    return qwen3.load(untaught)


def some_rows(seed, counts):
    """One row of 16 per entry, with so many tokens to learn."""
    draw = np.random.default_rng(seed)
    own = [np.arange(16) >= 16 - count for count in counts]
    ids = draw.integers(3, 600, (len(counts), 16)).astype(np.int32)
    return pack([Dialogue(*both) for both in zip(ids, own, strict=True)], 16, seed=0)


def params_of(model):
    return nnx.state(model, nnx.Param)


def assert_close(a, b, atol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


def test_an_update_is_adamw_on_the_mean_over_tokens(model):
    rows = some_rows(0, [3, 9])
    learner = Learner(model, cross_entropy, CONFIG)
    summed, norm = learner.update(jax.tree.map(lambda leaf: leaf[None], rows))

    def mean(model):
        found = cross_entropy(model, rows)
        return found.total / 12

    loss, gradient = jax.jit(jax.value_and_grad(mean))(model)
    gradient = params_of(gradient)
    np.testing.assert_allclose(float(norm), float(optax.tree.norm(gradient)), rtol=1e-5)
    np.testing.assert_allclose(float(summed.total) / 12, float(loss), rtol=1e-5)
    clipped = min(1.0, 1.0 / float(norm))

    def moved(path, param, g):
        # Adam's first change is the sign of the gradient, but for its epsilon.
        step = clipped * g / (clipped * jnp.abs(g) + 1e-8)
        decay = 0.0 if "scale" in jax.tree_util.keystr(path) else CONFIG.weight_decay * param
        return param - CONFIG.learning_rate * (step + decay)

    expected = jax.tree.map_with_path(moved, params_of(model), gradient)
    sure = jax.tree.map(lambda g: jnp.abs(g) > 1e-6, gradient)
    changed = params_of(learner.model())
    for x, y, mask in zip(*map(jax.tree.leaves, (changed, expected, sure)), strict=True):
        np.testing.assert_allclose(x[mask], y[mask], atol=2e-4)


def test_tokens_weigh_alike_in_whatever_micro_batch(model):
    rows = some_rows(1, [2, 15, 7, 1])
    whole = Learner(model, cross_entropy, CONFIG)
    parts = Learner(model, cross_entropy, replace(CONFIG, gradient_accumulation_steps=4))
    one, norm = whole.update(jax.tree.map(lambda leaf: leaf[None], rows))
    four, norm_of_parts = parts.update(jax.tree.map(lambda leaf: leaf[:, None], rows))
    assert float(one.weight) == float(four.weight) == 25
    np.testing.assert_allclose(float(one.total), float(four.total), rtol=1e-5)
    np.testing.assert_allclose(float(norm), float(norm_of_parts), rtol=1e-4)


def test_it_learns_and_leaves_the_first_model_alone(model):
    before = jax.tree.map(np.array, params_of(model))
    rows = some_rows(2, [12, 12])
    seen = []
    config = replace(
        CONFIG, max_steps=20, warmup_steps=2, logging_steps=5, gradient_accumulation_steps=2
    )
    learner = Learner(model, cross_entropy, config)
    reports = learner.run(batches(rows, 1, seed=0), report=seen.append)
    assert seen == reports
    assert [report.step for report in reports] == [5, 10, 15, 20]
    assert reports[-1].loss < 0.7 * reports[0].loss
    assert all(report.tokens == 24 and report.tokens_per_s > 0 for report in reports)
    assert 0 < reports[0].metrics["entropy"] <= np.log(model.config.vocab_size) + 1e-3
    assert_close(before, params_of(model), atol=0)


def test_adapters_alone_are_trained(model):
    adapted = add_adapters(model, rank=2, alpha=4.0, rngs=nnx.Rngs(0))
    learner = Learner(adapted, cross_entropy, CONFIG, trainable=nnx.LoRAParam)
    assert len(jax.tree.leaves(learner.state.params)) == 14
    learner.run(batches(some_rows(3, [8]), 1, seed=0))
    after = learner.model()
    assert_close(params_of(model)["embed_tokens"], params_of(after)["embed_tokens"], atol=0)
    b = after.layers.self_attn.q_proj.adapter.b[...]
    assert float(jnp.abs(b).max()) > 0


def test_masters_are_float32_and_nothing_to_learn_changes_nothing(untaught):
    half = qwen3.load(untaught, param_dtype=jnp.bfloat16)
    learner = Learner(half, cross_entropy, replace(CONFIG, weight_decay=0.0))
    learner.update(jax.tree.map(lambda leaf: leaf[None], some_rows(6, [0])))
    after = learner.model()
    assert {leaf.dtype for leaf in jax.tree.leaves(params_of(after))} == {jnp.dtype("float32")}
    assert after.dtype == jnp.bfloat16
    assert_close(params_of(qwen3.load(untaught, param_dtype=jnp.bfloat16)), params_of(after), 0)
    again = cast(after, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params_of(again))} == {jnp.dtype("bfloat16")}


def of_weights(model, rows):
    """A loss that is quick to compile."""
    return Summed(jnp.sum(model.norm.scale[...]) * rows, jnp.float32(1), {})


def test_a_loss_that_is_not_finite_stops_it(model):
    batches = [np.float32(1), np.float32(1), np.float32(np.nan), np.float32(1)]
    with pytest.raises(InputError, match=r"not finite in update 3; lower learning_rate"):
        Learner(model, of_weights, CONFIG).run(batches)


def test_a_run_goes_on_from_before_a_bad_update(model, tmp_path):
    config = replace(CONFIG, max_steps=6, save_steps=2)
    good = [np.float32(n) for n in range(1, 7)]
    whole = Learner(model, of_weights, config)
    expected = whole.run(good)
    checkpoints = Checkpoints(tmp_path)
    bad = [*good[:2], np.float32(np.inf), *good[3:]]
    with pytest.raises(InputError, match="not finite in update 3"):
        Learner(model, of_weights, config).run(bad, checkpoints=checkpoints)
    assert checkpoints.latest() == 2
    again = Learner(model, of_weights, config)
    assert again.resume(Checkpoints(tmp_path / "none")) is None
    assert again.resume(checkpoints) == {}
    assert again.step == again.consumed == 2
    reports = again.run(good[again.consumed :], checkpoints=checkpoints, extra=lambda: {"n": 1})
    assert [found.loss for found in reports] == [found.loss for found in expected[1:]]
    assert_close(again.state, whole.state, atol=0)
    assert checkpoints.restore(again.state).extra == {"n": 1}


def test_too_few_batches(model):
    with pytest.raises(InputError, match="ended after 1 of 4 updates"):
        Learner(model, of_weights, replace(CONFIG, gradient_accumulation_steps=2)).run(
            [np.float32(1)] * 3
        )


def test_schedule():
    rate = schedule(
        LearnerConfig(max_steps=100, learning_rate=1.0, warmup_steps=10, final_share=0.1)
    )
    found = [float(rate(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 0.55, 0.1], atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_steps": 0}, "max_steps: got 0"),
        ({"warmup_steps": 2000}, "warmup_steps: got 2000"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"adam_beta2": 1.0}, "adam_beta2"),
        ({"param_dtype": "float16"}, "param_dtype: got float16"),
        ({"save_steps": 15}, "save_steps: got 15, expected a multiple of logging_steps"),
    ],
)
def test_settings_without_meaning(wrong, message):
    with pytest.raises(InputError, match=message):
        LearnerConfig(**wrong)
