"""Objectives by hand, packed, split, and with garbage where nothing is learned."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy import qwen3
from policy.qwen3.logprobs import token_logprobs
from policy.train.losses import (
    PRESETS,
    Objective,
    RolloutRows,
    policy_loss,
    surrogate_loss,
)
from worldmodel.errors import InputError

LN2 = float(np.log(2.0))
PLAIN = Objective(correction="none")


def rows_of(old_logprobs, advantage, *, sampler_logprobs=None, reference=None, mask=None):
    """Two dialogues of three own tokens each, one prompt token before them, in rows of 5."""
    shape = (2, 5)

    def padded(values, fill):
        out = np.full(shape, fill, np.float32)
        out[:, 1:4] = values
        return out

    own = np.zeros(shape, bool)
    own[:, 1:4] = True if mask is None else mask
    old_logprobs = np.asarray(old_logprobs, np.float32)
    return RolloutRows(
        ids=np.zeros(shape, np.int32),
        positions=np.tile(np.arange(5, dtype=np.int32), (2, 1)),
        segments=np.array([[1, 1, 1, 1, 0]] * 2, np.int32),
        mask=own,
        sampler_logprobs=padded(
            old_logprobs if sampler_logprobs is None else sampler_logprobs, np.nan
        ),
        old_logprobs=padded(old_logprobs, -np.inf),
        reference=padded(0.0 if reference is None else reference, np.inf),
        advantage=padded(advantage, np.nan),
    )


def solved(rows, logprob, objective, entropy=None):
    """The mean, its gradient by own log-probabilities [2, 3], and the metrics."""
    inner = jnp.asarray(logprob, jnp.float32)
    entropies = jnp.zeros((2, 3)) if entropy is None else jnp.asarray(entropy, jnp.float32)

    def mean(inner):
        full = jnp.full((2, 5), -jnp.inf).at[:, 1:4].set(inner)
        other = jnp.full((2, 5), jnp.nan).at[:, 1:4].set(entropies)
        found = surrogate_loss(full, other, rows, objective)
        return found.total / found.weight, found

    (loss, found), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(inner)
    metrics = {name: float(value / found.weight) for name, value in found.metrics.items()}
    return float(loss), np.asarray(gradient), metrics


# Now against old_logprobs: token ratios 1, 2, 1/2 in the first dialogue, 2, 1/2, 1 in the second,
# whose last token is masked below (so it has two).
OLD = np.full((2, 3), -1.0)
NOW = OLD + np.array([[0.0, LN2, -LN2], [LN2, -LN2, 0.0]])
ADVANTAGE = np.array([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
MASK = np.array([[True, True, True], [True, True, False]])


def test_clip_with_a_mean_over_all_tokens():
    # min(rA, clip(r, 0.8, 1.28) A): 1, 1.28 (clipped), 0.5; then A = -1: -2, -0.8 (clipped).
    # Sum -0.02 over 5 tokens. Gradient of r A by logprob is r A where it is not clipped.
    rows = rows_of(OLD, ADVANTAGE, mask=MASK)
    loss, gradient, metrics = solved(rows, NOW, replace(PRESETS["DAPO"], correction="none"))
    assert loss == pytest.approx(0.02 / 5, abs=1e-6)
    expected = np.array([[-1.0, 0.0, -0.5], [2.0, 0.0, 0.0]]) / 5
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert metrics["clip_ratio/high"] == pytest.approx(1 / 5)
    assert metrics["clip_ratio/low"] == pytest.approx(1 / 5)
    assert metrics["ratio"] == pytest.approx((1 + 2 + 0.5 + 2 + 0.5) / 5)
    # k3 of r: r - 1 - ln r, so 0, 1 - ln 2, ln 2 - 1/2, 1 - ln 2, ln 2 - 1/2.
    assert metrics["ppo_kl"] == pytest.approx(1.0 / 5, abs=1e-6)


def test_a_mean_of_means_and_the_reference():
    # GRPO clips at 0.8 and 1.2: gains 1, 1.2, 0.5, mean 0.9; -2, -0.8, mean -1.4. Loss 0.25.
    # Reference = old_logprobs, so d = 0, -ln 2, ln 2 and -ln 2, ln 2; k3 = exp(d) - d - 1 is 0,
    # ln 2 - 1/2, 1 - ln 2: means 1/6 and 1/4, together 5/24. Gradient of k3: 1 - exp(d).
    rows = rows_of(OLD, ADVANTAGE, reference=OLD, mask=MASK)
    objective = replace(PRESETS["GRPO"], correction="none")
    loss, gradient, metrics = solved(rows, NOW, objective)
    assert loss == pytest.approx(0.25 + 0.04 * 5 / 24, abs=1e-6)
    assert metrics["kl"] == pytest.approx(5 / 24, abs=1e-6)
    surrogate = np.array([[-1.0, 0.0, -0.5], [2.0, 0.0, 0.0]])
    kl = np.array([[0.0, 0.5, -1.0], [0.5, -1.0, 0.0]])
    share = np.array([[1 / 6] * 3, [1 / 4] * 3])
    np.testing.assert_allclose(gradient, share * (surrogate + 0.04 * kl), atol=1e-6)
    # k2: d^2 / 2, gradient -d.
    loss, gradient, _ = solved(rows, NOW, replace(objective, kl_loss_type="k2"))
    assert loss == pytest.approx(0.25 + 0.04 * LN2**2 / 2 * (2 / 3 + 1) / 2, abs=1e-6)
    kl = LN2 * np.array([[0, 1, -1], [1, -1, 0]])
    np.testing.assert_allclose(gradient, share * (surrogate + 0.04 * kl), atol=1e-6)
    # Times r, k3 is r (1/r - 1 + ln r) = 1 - r + r ln r: 0, 2 ln 2 - 1, (1 - ln 2) / 2, and its
    # gradient r ln r.
    loss, gradient, _ = solved(rows, NOW, replace(objective, use_bias_correction_kl=True))
    two, half = 2 * LN2 - 1, (1 - LN2) / 2
    assert loss == pytest.approx(0.25 + 0.04 * (two + half) * (1 / 3 + 1 / 2) / 2, abs=1e-6)
    kl = LN2 * np.array([[0, 2, -0.5], [2, -0.5, 0]])
    np.testing.assert_allclose(gradient, share * (surrogate + 0.04 * kl), atol=1e-6)


def test_a_constant_length_and_entropy():
    # Dr. GRPO: the gains above sum to 2.7 and -2.8; 0.1 over 2 sequences of 10 tokens.
    # Entropies sum to 1.5 (the masked one, 9, does not count), with weight 0.1 to 0.15.
    rows = rows_of(OLD, ADVANTAGE, mask=MASK)
    objective = replace(PRESETS["DR_GRPO"], correction="none", constant_length=10, entropy_coef=0.1)
    entropy = [[0.2, 0.3, 0.4], [0.1, 0.5, 9.0]]
    loss, gradient, metrics = solved(rows, NOW, objective, entropy)
    assert loss == pytest.approx((0.1 - 0.15) / 20, abs=1e-6)
    expected = np.array([[-1.0, 0.0, -0.5], [2.0, 0.0, 0.0]]) / 20
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert metrics["entropy"] == pytest.approx((0.3 + 0.3) / 2)  # a mean of means


def test_ratios_of_sequences():
    # GSPO: log ratios (0, ln 2, 0) have the mean ln(2) / 3, so s = 2^(1/3) = 1.26: clipped for
    # A = 1. (ln 2, -2 ln 2) have the mean -ln(2) / 2, so s = 2^(-1/2) = 0.71: clipped for A = -1.
    now = OLD + LN2 * np.array([[0.0, 1.0, 0.0], [1.0, -2.0, 5.0]])
    rows = rows_of(OLD, ADVANTAGE, mask=MASK)
    objective = replace(PRESETS["GSPO"], correction="none")
    loss, gradient, metrics = solved(rows, now, objective)
    assert loss == pytest.approx((-1.0004 + 0.9997) / 2, abs=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)
    assert metrics["clip_ratio/high"] == metrics["clip_ratio/low"] == pytest.approx(0.5)
    # With the signs turned nothing is clipped: -s A, and the gradient -s A / tokens each.
    rows = rows_of(OLD, -ADVANTAGE, mask=MASK)
    loss, gradient, _ = solved(rows, now, objective)
    first, second = 2 ** (1 / 3), 2 ** (-1 / 2)
    assert loss == pytest.approx((first - second) / 2, abs=1e-6)
    expected = np.array([[first / 3] * 3, [-second / 2, -second / 2, 0.0]]) / 2
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_clipped_weights_of_log_probabilities():
    # CISPO with ratios capped at 1.5: weights 1, 1.5, 0.5; 1.5, 0.5; every token has a gradient.
    rows = rows_of(OLD, ADVANTAGE, mask=MASK)
    objective = replace(PRESETS["CISPO"], correction="none", epsilon_high=0.5)
    loss, gradient, metrics = solved(rows, NOW, objective)
    weights = np.array([[1.0, 1.5, 0.5], [1.5, 0.5, 0.0]])
    assert loss == pytest.approx(-(weights * ADVANTAGE * NOW).sum() / 5, abs=1e-6)
    np.testing.assert_allclose(gradient, -weights * ADVANTAGE / 5, atol=1e-6)
    assert metrics["clip_ratio/high"] == pytest.approx(2 / 5)
    loss, gradient, metrics = solved(rows, NOW, replace(PLAIN, loss_type="reinforce"))
    assert loss == pytest.approx(-(ADVANTAGE * NOW)[MASK].sum() / 5, abs=1e-6)
    np.testing.assert_allclose(gradient, np.where(MASK, -ADVANTAGE, 0) / 5, atol=1e-6)
    assert "clip_ratio/high" not in metrics


def test_a_second_bound_where_the_advantage_is_negative():
    # Ratios 1, 2, 4 with A = -1 and a bound of 3: gains -1, -2, -3; the last has no gradient.
    now = OLD + LN2 * np.array([[0.0, 1.0, 2.0]] * 2)
    rows = rows_of(OLD, -np.ones((2, 3)))
    loss, gradient, metrics = solved(rows, now, replace(PLAIN, dual_clip=3.0))
    assert loss == pytest.approx(2.0)
    np.testing.assert_allclose(gradient, np.array([[1.0, 2.0, 0.0]] * 2) / 6, atol=1e-6)
    assert metrics["clip_ratio/dual"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        # q = exp(old_logprobs - sampler_logprobs): 1, 4, 1/4 and 2, 2, (masked)
        ({"correction": "none"}, [[1, 1, 1], [1, 1, 0]]),
        ({"correction": "truncate", "correction_cap": 3.0}, [[1, 3, 0.25], [2, 2, 0]]),
        (
            {"correction": "mask", "correction_low": 0.5, "correction_cap": 3.0},
            [[1, 0, 0], [2, 2, 0]],
        ),
        # Products 1 and 4; geometric means 1 and 2.
        (
            {"correction": "mask", "correction_level": "sequence", "correction_cap": 3.0},
            [[1, 1, 1], [0, 0, 0]],
        ),
        (
            {"correction": "truncate", "correction_level": "sequence", "correction_cap": 3.0},
            [[1, 1, 1], [3, 3, 0]],
        ),
        (
            {"correction": "mask", "correction_level": "geometric", "correction_cap": 3.0},
            [[1, 1, 1], [2, 2, 0]],
        ),
        (
            {"correction": "mask", "correction_level": "geometric", "correction_cap": 1.5},
            [[1, 1, 1], [0, 0, 0]],
        ),
    ],
)
def test_weights_of_the_sampler(settings, weights):
    sampler_logprobs = OLD - LN2 * np.array([[0, 2, -2], [1, 1, 7]])
    rows = rows_of(OLD, ADVANTAGE, sampler_logprobs=sampler_logprobs, mask=MASK)
    objective = Objective(**settings)
    loss, gradient, metrics = solved(rows, OLD, objective)
    weights = np.array(weights, np.float64)
    assert loss == pytest.approx(-(weights * ADVANTAGE).sum() / 5, abs=1e-5)
    np.testing.assert_allclose(gradient, -weights * ADVANTAGE / 5, atol=1e-5)
    assert metrics["correction"] == pytest.approx(weights.sum() / 5, abs=1e-5)
    assert metrics["masked"] == pytest.approx((weights[MASK] == 0).mean())
    assert metrics["mismatch"] == pytest.approx(LN2 * 6 / 5, abs=1e-6)


def test_masked_tokens_keep_their_place_in_the_divisor_and_the_reference():
    sampler_logprobs = OLD - LN2 * np.array([[0, 2, 0], [0, 0, 0]])
    rows = rows_of(OLD, ADVANTAGE, sampler_logprobs=sampler_logprobs, reference=OLD + LN2)
    objective = Objective(correction="mask", beta=1.0)
    loss, gradient, _ = solved(rows, OLD, objective)
    # The surrogates -1, 0 (masked), -1 and 1, 1, 1; k3 of d = ln 2 is 1 - ln 2 everywhere.
    assert loss == pytest.approx(1 / 6 + 1 - LN2, abs=1e-6)
    assert gradient[0, 1] == pytest.approx(-1 / 6, abs=1e-6)  # of k3 alone: 1 - exp(d)


@pytest.mark.parametrize("name", PRESETS)
def test_extremes_stay_finite(name):
    far = np.array([[500.0, -500.0, 0.0], [1.0, -2.0, 3.0]])
    rows = rows_of(OLD, ADVANTAGE, sampler_logprobs=OLD + far, reference=OLD - far)
    loss, gradient, metrics = solved(rows, OLD - far, replace(PRESETS[name], beta=0.1))
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    assert np.isfinite(list(metrics.values())).all()


def test_damage_in_an_own_token_is_not_hidden():
    rows = rows_of(OLD, np.array([[1.0, np.nan, 1.0]] * 2))
    assert np.isnan(solved(rows, NOW, PLAIN)[0])


LENGTHS = (9, 12, 6)


def some_rows(seed):
    """One dialogue per row; ordinary figures where the mask is, garbage in other places."""
    draw = np.random.default_rng(seed)
    shape = len(LENGTHS), max(LENGTHS)
    within = np.arange(shape[1]) < np.array(LENGTHS)[:, None]
    mask = within & (np.arange(shape[1]) > 2) & (draw.random(shape) < 0.7)

    def leaf(mean, scatter, garbage):
        return np.where(mask, draw.normal(mean, scatter, shape), garbage).astype(np.float32)

    return RolloutRows(
        ids=np.where(within, draw.integers(3, 600, shape), 0).astype(np.int32),
        positions=np.where(within, np.arange(shape[1]), 0).astype(np.int32),
        segments=within.astype(np.int32),
        mask=mask,
        sampler_logprobs=leaf(-6, 0.3, np.nan),
        old_logprobs=leaf(-6, 0.3, -np.inf),
        reference=leaf(-6, 0.3, np.nan),
        advantage=leaf(0, 1, np.inf),
    )


def packed(leaf, extra=0):
    """All dialogues in one row, and some padding."""
    parts = [row[:length] for row, length in zip(leaf, LENGTHS, strict=True)]
    return np.concatenate([*parts, np.full(5, extra, leaf.dtype)])[None]


def packed_rows(rows):
    floats = {"sampler_logprobs", "old_logprobs", "reference", "advantage"}
    leaves = rows._replace(segments=rows.segments * np.array([[1], [2], [3]], np.int32))._asdict()
    del leaves["wanted"]  # of no decision
    return RolloutRows(**{n: packed(x, np.nan if n in floats else 0) for n, x in leaves.items()})


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-4 * float(jnp.abs(a).max()) + 1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        replace(PRESETS["DAPO"], beta=0.1, entropy_coef=0.01),
        replace(PRESETS["GSPO"], epsilon_high=0.1, correction_level="geometric", beta=0.1),
        replace(PRESETS["DR_GRPO"], correction="mask", correction_level="sequence"),
    ],
    ids=lambda objective: objective.normalization,
)
def test_packing_and_splitting_change_nothing(objective):
    rows = some_rows(3)
    draw = np.random.default_rng(4)
    logprob, entropy = (draw.normal(m, 0.3, rows.ids.shape).astype(np.float32) for m in (-6, 3))

    @jax.jit
    def solve(logprob, entropy, rows):
        def total(logprob):
            found = surrogate_loss(logprob, entropy, rows, objective)
            return found.total, found

        return jax.grad(total, has_aux=True)(logprob)

    gradient, whole = solve(logprob, entropy, rows)
    count = rows.mask.sum() if objective.normalization == "token" else 3
    assert float(whole.weight) == pytest.approx(count, abs=1e-5)
    parts = [
        solve(*jax.tree.map(lambda x, n=n: x[n : n + 1], (logprob, entropy, rows)))
        for n in range(3)
    ]
    assert_same(whole, jax.tree.map(lambda *leaves: sum(leaves), *(part[1] for part in parts)))
    assert_same(gradient, np.concatenate([part[0] for part in parts]))
    turned, together = solve(packed(logprob), packed(entropy), packed_rows(rows))
    assert_same(whole, together)
    assert_same(packed(np.asarray(gradient)), turned)


def test_a_model_on_packed_rows(untaught):
    model = qwen3.load(untaught)
    rows = some_rows(5)

    @jax.jit
    def solve(model, rows):
        def total(model):
            objective = replace(PRESETS["DAPO"], beta=0.1, entropy_coef=0.01)
            found = policy_loss(model, rows, objective, temperature=0.8)
            return found.total, found

        return jax.grad(total, has_aux=True)(model)

    alone, together = solve(model, rows), solve(model, packed_rows(rows))
    assert float(jnp.abs(alone[0].norm.scale[...]).max()) > 1e-3
    assert_same(alone, together)
    scored = token_logprobs(
        model, rows.ids, positions=rows.positions, segments=rows.segments, temperature=0.8
    )
    entropy = float(np.asarray(scored.entropy)[rows.mask].sum())
    assert float(alone[1].metrics["entropy"]) == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"importance_sampling_level": "word"},
            "importance_sampling_level: got word, expected one of token, sequence",
        ),
        ({"kl_loss_type": "k1"}, "kl_loss_type: got k1"),
        ({"epsilon_low": 1.5}, "epsilon_low"),
        ({"dual_clip": 1.1}, "dual_clip: got 1.1, expected above"),
        ({"correction_cap": 0.9}, "correction_cap"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        Objective(**settings)
