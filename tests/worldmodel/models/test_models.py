"""GRU, windows, encodings, losses and the ensemble, each against a plain implementation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import (
    LOG_SIGMA_RANGE,
    ModelConfig,
    OutcomeModel,
    Prediction,
    StateModel,
)
from worldmodel.models.evaluation import gaussian_crps
from worldmodel.models.fitting import gaussian_nll, state_loss
from worldmodel.models.gru import GRU, GRUCell
from worldmodel.models.windows import (
    Target,
    encode_action,
    every_step_index,
    last_step_index,
    to_sequences,
    transition_index,
)
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler

SMALL = ModelConfig(variant="residual", hidden=8, embed=4, head=6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def episodes():
    return toy_episodes(20, 9)


@pytest.fixture(scope="module")
def sequences(episodes):
    return to_sequences(episodes, Scaler.fit(episodes))


def random_window(width, batch=5, seed=0):
    rng = np.random.default_rng(seed)
    action = encode_action(jnp.asarray(rng.integers(-1, 25, (batch, width))))
    return (
        jnp.asarray(rng.normal(size=(batch, width, 39)), jnp.float32),
        jnp.asarray(rng.random((batch, width, 38)) < 0.5, jnp.float32),
        jnp.asarray(rng.normal(size=(batch, 3)), jnp.float32),
        action,
    )


# GRU


def test_gru_is_its_equations():
    cell = GRUCell(3, 4, rngs=nnx.Rngs(1), precision="highest")
    rng = np.random.default_rng(0)
    x, h = rng.normal(size=(2, 3)), rng.normal(size=(2, 4))
    got = cell.step(cell.project_input(jnp.asarray(x, jnp.float32)), jnp.asarray(h, jnp.float32))
    from_x = x @ np.asarray(cell.weight_input[...]) + np.asarray(cell.bias_input[...])
    from_h = h @ np.asarray(cell.weight_hidden[...]) + np.asarray(cell.bias_hidden[...])
    r = sigmoid(from_x[:, :4] + from_h[:, :4])
    z = sigmoid(from_x[:, 4:8] + from_h[:, 4:8])
    n = np.tanh(from_x[:, 8:] + r * from_h[:, 8:])
    np.testing.assert_allclose(got, (1 - z) * n + z * h, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_gru_stack_matches_torch(layers):
    torch = pytest.importorskip("torch")
    flax_gru = GRU(7, 5, layers, dropout=0.2, rngs=nnx.Rngs(2), precision="highest")
    torch_gru = torch.nn.GRU(7, 5, num_layers=layers, batch_first=True)
    with torch.no_grad():
        for i, cell in enumerate(flax_gru.cells):
            for name, value in (
                ("weight_ih", cell.weight_input[...].T),
                ("weight_hh", cell.weight_hidden[...].T),
                ("bias_ih", cell.bias_input[...]),
                ("bias_hh", cell.bias_hidden[...]),
            ):
                getattr(torch_gru, f"{name}_l{i}").copy_(torch.from_numpy(np.array(value)))
        x = np.random.default_rng(0).normal(size=(4, 6, 7)).astype(np.float32)
        want = torch_gru(torch.from_numpy(x))[0][:, -1].numpy()
    np.testing.assert_allclose(flax_gru(jnp.asarray(x)), want, atol=1e-5, rtol=0)


def test_dropout_acts_only_with_a_key():
    model = StateModel(replace(SMALL, variant="reference"), rngs=nnx.Rngs(0))
    window = random_window(6)
    plain = model(*window)
    np.testing.assert_array_equal(plain.mu, model(*window).mu)
    one, two = (model(*window, key=jax.random.key(k)).mu for k in (1, 2))
    np.testing.assert_array_equal(one, model(*window, key=jax.random.key(1)).mu)
    assert not np.allclose(one, two) and not np.allclose(one, plain.mu)


# Windows


def test_encoding_of_actions_by_hand():
    got = encode_action(jnp.array([0, 7, 24, -1]))  # 7 = vasopressor 1, fluid 2
    want = np.zeros((4, 10))
    want[0, [0, 5]] = want[1, [1, 7]] = want[2, [4, 9]] = 1
    np.testing.assert_array_equal(got, want)


def test_rows_before_admission_are_all_zero(sequences):
    index = np.array([[0, 0], [0, 3]], np.int32)
    window = sequences.window(index, 6)
    for part in (window.obs, window.observed, window.action):
        assert not np.asarray(part[0, :5]).any() and not np.asarray(part[1, :2]).any()
    assert np.asarray(window.action[0, 5]).sum() == 2
    assert np.asarray(window.obs[1, 2]).any()


def test_window_rows_are_the_records(episodes, sequences):
    scaler = Scaler.fit(episodes)
    window = sequences.window(np.array([[0, 7]], np.int32), 6)
    rows = np.arange(2, 8)
    np.testing.assert_array_equal(window.obs[0], scaler.normalize(episodes.dynamic[0, rows]))
    np.testing.assert_array_equal(window.observed[0], episodes.measured[0, rows])
    np.testing.assert_array_equal(window.static[0], scaler.normalize_static(episodes.static[0]))
    np.testing.assert_array_equal(
        np.argmax(window.action[0, :, :5], -1), episodes.vasopressor[0, rows]
    )
    np.testing.assert_array_equal(np.argmax(window.action[0, :, 5:], -1), episodes.fluid[0, rows])


def test_target_is_the_next_row(episodes, sequences):
    scaler = Scaler.fit(episodes)
    target = sequences.target(np.array([[0, 2], [1, 0]], np.int32))
    stays, rows = np.array([0, 1]), np.array([3, 1])
    np.testing.assert_array_equal(target.obs, scaler.normalize(episodes.dynamic[stays, rows]))
    np.testing.assert_array_equal(target.ventilated, episodes.ventilated[stays, rows])
    np.testing.assert_array_equal(target.measured[:, :38], episodes.measured[stays, rows])


def test_urine_counts_as_measured_above_zero(episodes):
    dynamic = episodes.dynamic.at[0, 1, schema.URINE].set(0.0)
    dynamic = dynamic.at[0, 2, schema.URINE].set(0.5)
    sequences = to_sequences(replace(episodes, dynamic=dynamic), Scaler.fit(episodes))
    measured = sequences.target(np.array([[0, 0], [0, 1]], np.int32)).measured[:, schema.URINE]
    np.testing.assert_array_equal(measured, [False, True])


def test_nothing_after_the_stay_leaks_in(episodes, sequences):
    later = ~np.asarray(episodes.valid)
    dirty = replace(
        episodes,
        dynamic=jnp.where(later[..., None], 1e6, episodes.dynamic),
        vasopressor=jnp.where(later, 4, episodes.vasopressor),
        ventilated=episodes.ventilated | later,
    )
    again = to_sequences(dirty, Scaler.fit(episodes))
    jax.tree.map(np.testing.assert_array_equal, again, sequences)


def test_indices_by_hand(episodes):
    few = replace(
        episodes.select(np.arange(3)), length=jnp.array([3, 1, 2]), stay_id=jnp.array([7, 8, 9])
    )
    assert transition_index(few).tolist() == [[0, 0], [0, 1], [2, 0]]
    assert last_step_index(few).tolist() == [[0, 2], [1, 0], [2, 1]]
    assert every_step_index(few).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0], [2, 1]]


# Losses


def test_nll_is_the_normal_density():
    rng = np.random.default_rng(0)
    x, mu, log_sigma = rng.normal(size=(3, 50))
    want = -norm.logpdf(x, mu, np.exp(log_sigma))
    np.testing.assert_allclose(gaussian_nll(*map(jnp.asarray, (x, mu, log_sigma))), want, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "mu", "sigma"), [(0.3, 0.0, 1.0), (2.0, -1.0, 0.5), (-4.0, 1.0, 3.0)]
)
def test_crps_is_its_integral(x, mu, sigma):
    def gap(y):
        return (norm.cdf(y, mu, sigma) - (y >= x)) ** 2

    want = quad(gap, mu - 40, x)[0] + quad(gap, x, mu + 40)[0]
    assert gaussian_crps(x, mu, sigma) == pytest.approx(want, rel=1e-5)


def test_state_loss_by_hand():
    # sigma = 1, errors 1 and 2: NLL 0.5 + c and 2 + c, with c = log(2 pi) / 2; the second entry
    # is imputed, weight 0.1. Ventilation at logit 0: log 2.
    prediction = Prediction(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.zeros(1))
    target = Target(jnp.array([[1.0, 2.0]]), jnp.array([[True, False]]), jnp.array([True]))
    got = state_loss(prediction, target, imputed_weight=0.1, vent_weight=0.3)
    c = 0.5 * np.log(2 * np.pi)
    want = (1.0 * (0.5 + c) + 0.1 * (2.0 + c)) / 1.1 + 0.3 * np.log(2)
    assert got == pytest.approx(want, rel=1e-6)


def test_state_loss_without_measurements_is_finite():
    prediction = Prediction(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.zeros(1))
    target = Target(jnp.ones((1, 2)), jnp.zeros((1, 2), bool), jnp.array([True]))
    got = state_loss(prediction, target, imputed_weight=0.0, vent_weight=0.3)
    assert got == pytest.approx(0.3 * np.log(2), rel=1e-6)


# The variants


def test_residual_starts_from_the_last_value():
    model = StateModel(SMALL, rngs=nnx.Rngs(0))
    window = random_window(6)
    mu, log_sigma, _ = model(*window)
    np.testing.assert_array_equal(mu, window[0][:, -1])
    np.testing.assert_allclose(log_sigma, sum(LOG_SIGMA_RANGE) / 2, rtol=1e-6)  # sigmoid(0)


def test_autoregression_sees_just_its_rows():
    model = StateModel(replace(SMALL, linear_rows=2), rngs=nnx.Rngs(0))
    assert model.autoregression.kernel.shape == (2 * (39 + 38 + 10) + 3, 39)
    model.autoregression.kernel[...] = jax.random.normal(jax.random.key(0), (177, 39))
    obs, observed, static, action = random_window(6)
    plain = model(obs, observed, static, action).mu
    older = model(obs.at[:, :4].add(1.0), observed, static, action).mu
    np.testing.assert_array_equal(plain, older)  # the heads are still zero
    newer = model(obs.at[:, 4].add(1.0), observed, static, action).mu
    assert not np.allclose(plain, newer)
    # By hand: last value + [rows 4, 5 of (obs, observed, action), static] @ kernel.
    rows = np.concatenate([np.concatenate([x[:, t] for x in (obs, observed, action)], 1)
                           for t in (4, 5)], 1)  # fmt: skip
    inputs = np.concatenate([rows, static], 1).astype(np.float64)
    want = np.asarray(obs[:, -1]) + inputs @ np.asarray(model.autoregression.kernel[...])
    np.testing.assert_allclose(plain, want, rtol=1e-4, atol=1e-4)


def test_outcome_model_gives_one_logit_each():
    model = OutcomeModel(SMALL, rngs=nnx.Rngs(0))
    assert model(*random_window(12)).shape == (5,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "linear"}, "variant: got 'linear'"),
        ({"hidden": 0}, "hidden: got 0, expected 1 to 16384"),
        ({"linear_rows": 7}, "linear_rows: got 7"),
        ({"dropout": 1.0}, r"dropout: got 1\.0"),
        ({"dropout": -0.1}, r"dropout: got -0\.1"),
        ({"precision": "double"}, "precision: got 'double'"),
    ],
)
def test_bad_shapes_of_models_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(**settings)


# Ensembles


@pytest.fixture(scope="module")
def ensemble():
    unit = Scaler(jnp.zeros(39), jnp.ones(39), jnp.zeros(3), jnp.ones(3))
    config = replace(SMALL, variant="reference")
    return init_world_model(jax.random.key(5), unit, config, members=3)


def test_members_differ_and_are_the_ensembles(ensemble):
    window = random_window(6)
    together = ensemble.transitions(*window)
    for i in range(3):
        alone = ensemble.member(i).transition(*window)
        for got, want in zip(alone, together, strict=True):
            np.testing.assert_allclose(got, want[i], atol=1e-6)
    assert not np.allclose(together.mu[0], together.mu[1])
    np.testing.assert_array_equal(
        ensemble.member(-1).transition(*window).mu, ensemble.member(2).transition(*window).mu
    )


def test_no_such_member(ensemble):
    for index in (3, -4):
        with pytest.raises(InputError, match="3 members"):
            ensemble.member(index)


def test_ensemble_predicts_mixture_moments(ensemble):
    window = random_window(6)
    members = [ensemble.member(i).transition(*window) for i in range(3)]
    mu = np.stack([m.mu for m in members]).astype(np.float64)
    variance = np.exp(2 * np.stack([m.log_sigma for m in members]).astype(np.float64))
    # E x = mean of means; Var x = E x^2 - (E x)^2.
    second = (variance + mu**2).mean(0)
    got = ensemble.transition(*window)
    np.testing.assert_allclose(got.mu, mu.mean(0), atol=1e-6)
    np.testing.assert_allclose(np.exp(2 * got.log_sigma), second - mu.mean(0) ** 2, rtol=1e-4)
    vent = sigmoid(np.stack([m.vent_logit for m in members])).mean(0)
    np.testing.assert_allclose(sigmoid(np.asarray(got.vent_logit)), vent, rtol=1e-5)


def test_ensemble_mortality_is_the_mean_probability(ensemble):
    window = random_window(12)
    each = [sigmoid(np.asarray(ensemble.member(i).mortality_logit(*window))) for i in range(3)]
    got = sigmoid(np.asarray(ensemble.mortality_logit(*window)))
    np.testing.assert_allclose(got, np.mean(each, 0), rtol=1e-5)


STAYS = toy_episodes(num_stays=6, num_steps=9, seed=3)
SEQUENCES = to_sequences(STAYS, Scaler.fit(STAYS))
ROWS = every_step_index(STAYS)
WIDTHS = st.sampled_from((1, 6, 12))  # each compiles


@settings(max_examples=25, deadline=None)
@given(st.integers(0, len(ROWS) - 1), WIDTHS, WIDTHS)
def test_a_narrow_window_is_the_end_of_a_wide_one(row, one, other):
    narrow, wide = sorted((one, other))
    index = ROWS[[row]]
    short, long = SEQUENCES.window(index, narrow), SEQUENCES.window(index, wide)
    for a, b in ((short.obs, long.obs), (short.observed, long.observed),
                 (short.action, long.action)):  # fmt: skip
        np.testing.assert_array_equal(a, b[:, wide - narrow :])
    np.testing.assert_array_equal(short.static, long.static)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, len(ROWS) - 1), WIDTHS)
def test_windows_are_zero_before_admission_and_hold_one_pair_per_row_after(row, width):
    window = SEQUENCES.window(ROWS[[row]], width)
    before = max(width - 1 - int(ROWS[row, 1]), 0)
    for leaf in (window.obs, window.observed, window.action):
        assert not np.asarray(leaf)[:, :before].any()
    np.testing.assert_array_equal(np.asarray(window.action)[0, before:].sum(-1), 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, len(ROWS) - 1))
def test_the_target_is_the_newest_row_of_the_next_window(row):
    stay, step = ROWS[row]
    if step + 1 < int(STAYS.length[stay]):
        target = SEQUENCES.target(ROWS[[row]])
        following = SEQUENCES.window(np.array([[stay, step + 1]], np.int32), 1)
        np.testing.assert_array_equal(target.obs, following.obs[:, 0])
