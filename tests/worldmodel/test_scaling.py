"""Scaling: fitted on training stays only, urine by its logarithm, sex left alone."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.scaling import FEATURE_FILE, SCALER_FILE, Scaler, published_scaler

URINE = 38


@pytest.fixture(scope="module")
def episodes():
    return toy_episodes(30, 8)


@pytest.fixture(scope="module")
def scaler(episodes):
    return Scaler.fit(episodes)


def training_rows(episodes):
    """[R, 39] the recorded rows of the training stays, stay by stay."""
    return np.concatenate(
        [
            np.asarray(episodes.dynamic[i, : int(episodes.length[i])], np.float64)
            for i in range(episodes.num_stays)
            if int(episodes.split[i]) == 0
        ]
    )


def test_moments_are_those_of_recorded_training_rows(episodes, scaler):
    rows = training_rows(episodes)
    rows[:, URINE] = np.log1p(rows[:, URINE])
    np.testing.assert_allclose(scaler.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(scaler.std, rows.std(0), rtol=1e-5)
    train = np.asarray(episodes.split) == 0
    age = np.asarray(episodes.static, np.float64)[train, 0]
    np.testing.assert_allclose(scaler.static_mean, (age.mean(), 0, scaler.static_mean[2]))
    np.testing.assert_allclose(scaler.static_std[0], age.std(), rtol=1e-6)


def test_other_splits_do_not_matter(episodes, scaler):
    other = np.asarray(episodes.split) != 0
    changed = replace(
        episodes,
        dynamic=episodes.dynamic * jnp.where(other, 7.0, 1.0)[:, None, None],
        static=episodes.static + jnp.where(other, 50.0, 0.0)[:, None],
    )
    jax.tree.map(np.testing.assert_array_equal, Scaler.fit(changed), scaler)
    moved = Scaler.fit(changed, split=None)
    assert not np.allclose(moved.mean, scaler.mean)


def test_training_rows_become_standard(episodes, scaler):
    z = np.asarray(scaler.normalize(training_rows(episodes)))
    np.testing.assert_allclose(z.mean(0), 0, atol=2e-5)
    np.testing.assert_allclose(z.std(0), 1, atol=1e-4)


def test_scaling_by_hand(unit_scaler):
    scaler = replace(unit_scaler, mean=jnp.full(39, 2.0).at[URINE].set(4.0), std=jnp.full(39, 0.5))
    dynamic = jnp.full(39, 3.0).at[URINE].set(np.e**5 - 1)
    z = scaler.normalize(dynamic)
    np.testing.assert_allclose(z, 2.0, rtol=1e-6)  # (3 - 2) / 0.5; urine: (5 - 4) / 0.5


def test_negative_urine_counts_as_none(unit_scaler):
    assert unit_scaler.normalize(jnp.zeros(39).at[URINE].set(-5.0))[URINE] == 0.0
    assert unit_scaler.denormalize(jnp.zeros(39).at[URINE].set(-1.0))[URINE] == 0.0


def test_sex_stays_raw(scaler):
    static = scaler.normalize_static(jnp.array([[60.0, 1.0, 4.0], [60.0, 0.0, 4.0]]))
    np.testing.assert_array_equal(static[:, 1], [1.0, 0.0])
    np.testing.assert_allclose(
        static[0, 0], (60.0 - scaler.static_mean[0]) / scaler.static_std[0], rtol=1e-6
    )


def test_scaling_and_back_is_the_identity(episodes, scaler):
    rows = training_rows(episodes)
    np.testing.assert_allclose(scaler.denormalize(scaler.normalize(rows)), rows, rtol=2e-5)


def test_a_constant_feature_gets_unit_spread(episodes):
    constant = replace(episodes, dynamic=episodes.dynamic.at[..., 0].set(80.0))
    scaler = Scaler.fit(constant)
    assert (scaler.mean[0], scaler.std[0]) == (80.0, 1.0)


def test_no_training_stays_is_an_error(episodes):
    with pytest.raises(InputError, match="train split holds no stays"):
        Scaler.fit(episodes.of_split("test"))


def test_dict_round_trips_exactly(scaler):
    value = json.loads(json.dumps(scaler.to_dict()))
    jax.tree.map(np.testing.assert_array_equal, Scaler.from_dict(value), scaler)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ["lactate"]}, "features differ from the schema's order"),
        ({"mean": None}, "mean"),
        ({"mean": [0.0] * 38}, r"mean has shape \(38,\), expected \(39,\)"),
        ({"static_std": [1.0] * 4}, r"static_std has shape \(4,\)"),
        ({"std": [0.0] * 39}, "std"),
        ({"std": ["x"] * 39}, "std"),
        ({"mean": [float("nan")] * 39}, "mean"),
    ],
)
def test_bad_scalers_are_refused(scaler, change, message):
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        Scaler.from_dict({**scaler.to_dict(), **change}, source="here")


def test_a_missing_field_is_named(scaler):
    value = scaler.to_dict()
    del value["std"]
    with pytest.raises(InputError, match="field 'std' is missing"):
        Scaler.from_dict(value)


@pytest.fixture
def published(tmp_path):
    """The two published files, their fields by hand: feature j has mean j and spread j + 1."""
    scaler = {
        "dyn_cols": list(schema.FEATURE_NAMES),
        "dyn_mean": [float(j) for j in range(39)],
        "dyn_std": [float(j + 1) for j in range(39)],
        "clip_q_low": {name: 0.0 for name in schema.MASKED_NAMES},
        "clip_q_high": {name: 1.0 for name in schema.MASKED_NAMES},
        "urine_log_transform": True,
        "urine_idx": 38,
    }
    features = {
        "dynamic_cols": list(schema.FEATURE_NAMES),
        "mask_cols": [f"{name}_mask" for name in schema.MASKED_NAMES],
        "static_cols": ["age", "gender", "charlson_comorbidity_index"],
        "static_scaler_mean": [64.0, 5.0],
        "static_scaler_std": [16.0, 3.0],
    }
    (tmp_path / SCALER_FILE).write_text(json.dumps(scaler))
    (tmp_path / FEATURE_FILE).write_text(json.dumps(features))
    return tmp_path


def test_published_files_are_read(published):
    assert (SCALER_FILE, FEATURE_FILE) == ("scaler_params_log.json", "episode_feature_config.json")
    scaler = Scaler.from_reference(published)
    np.testing.assert_array_equal(scaler.mean, np.arange(39))
    np.testing.assert_array_equal(scaler.std, np.arange(1, 40))
    # Age 80: (80 - 64) / 16; sex as it is; Charlson 11: (11 - 5) / 3.
    np.testing.assert_allclose(scaler.normalize_static(jnp.array([80.0, 1.0, 11.0])), [1, 1, 2])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (SCALER_FILE, {"dyn_cols": list(schema.FEATURE_NAMES[::-1])}, "dyn_cols differ"),
        (SCALER_FILE, {"urine_log_transform": False}, "urine_log_transform must be true"),
        (SCALER_FILE, {"dyn_mean": [0.0] * 38}, "mean"),
        (FEATURE_FILE, {"static_scaler_mean": [64.0, 0.5, 5.0]}, "malformed"),
        (FEATURE_FILE, {"static_scaler_std": "x"}, "malformed"),
        (FEATURE_FILE, {"static_cols": ["gender", "age", "charlson"]}, "static_cols"),
    ],
)
def test_bad_published_files_are_refused(published, file, change, message):
    value = json.loads((published / file).read_text())
    (published / file).write_text(json.dumps({**value, **change}))
    with pytest.raises(InputError, match=message):
        Scaler.from_reference(published)


UNIT_STAYS = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).random((4, 39)))


@settings(max_examples=25, deadline=None)
@given(UNIT_STAYS)
def test_values_within_the_ranges_come_back(share):
    scaler = published_scaler()
    values = (schema.LOW + share * (schema.HIGH - schema.LOW)).astype(np.float32)
    back = scaler.denormalize(scaler.normalize(values))
    np.testing.assert_allclose(back, values, rtol=2e-3, atol=2e-3)


@settings(max_examples=25, deadline=None)
@given(UNIT_STAYS, st.integers(0, 38))
def test_scores_keep_the_order_of_a_feature_and_touch_no_other(share, feature):
    scaler = published_scaler()
    values = (schema.LOW + share * (schema.HIGH - schema.LOW)).astype(np.float32)
    values[:, feature] = np.sort(values[:, feature])
    other = values.copy()
    other[:, feature] = schema.HIGH[feature]
    scores, changed = np.asarray(scaler.normalize(values)), np.asarray(scaler.normalize(other))
    assert (np.diff(scores[:, feature]) >= 0).all()
    assert (changed[:, feature] >= scores[:, feature]).all()
    apart = np.arange(39) != feature
    np.testing.assert_array_equal(changed[:, apart], scores[:, apart])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-10, 10))
def test_scores_of_any_size_become_urine_of_at_least_zero(seed, size):
    obs = np.random.default_rng(seed).normal(size=(3, 39)).astype(np.float32) * size
    assert (np.asarray(published_scaler().denormalize(obs))[:, URINE] >= 0).all()
