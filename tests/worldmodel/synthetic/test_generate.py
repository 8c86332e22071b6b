"""Episodes of the synthetic world: reproducible, consistent and close to published marginals."""

import jax
import numpy as np
import pytest

from tests.worldmodel.synthetic.conftest import WORLD, assert_same
from worldmodel import imputation, schema
from worldmodel.clinical import reward, sofa
from worldmodel.episode_files import from_table, to_table
from worldmodel.errors import InputError
from worldmodel.synthetic import generate, marginals, recorded_statistics, stay_statistics
from worldmodel.synthetic.generate import EXEMPT, generate_patients


def test_same_key_same_world(world):
    assert_same(generate(WORLD, 3000), world)


def test_other_key_other_world(world):
    other, _ = generate(jax.random.key(8), 100)
    assert not np.array_equal(other.dynamic[:, 0], world[0].dynamic[:100, 0])


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1000, 77), (2990, 10)])
def test_a_patient_does_not_depend_on_the_batch(world, first, count):
    episodes, truth = generate(WORLD, count, first_patient=first)
    assert_same(episodes, world[0].select(slice(first, first + count)))
    assert_same(truth.reward, world[1].reward[first : first + count])


@pytest.mark.slow
def test_block_size_changes_nothing_but_rounding(world):
    """Another block size is another program, whose last bits may differ."""
    episodes, _ = generate(WORLD, 1000, block=256)
    expected = world[0].select(slice(0, 1000))
    same = np.asarray((episodes.action == expected.action).all(1))
    assert same.mean() > 0.998
    np.testing.assert_allclose(
        episodes.behavior_prob[same], expected.behavior_prob[same], rtol=1e-4
    )


def test_no_value_is_missing_or_out_of_range(world):
    episodes, truth = world
    for leaf in jax.tree.leaves((episodes, truth.probabilities, truth.reward)):
        assert np.isfinite(np.asarray(leaf, np.float64)).all()
    rows = np.asarray(episodes.dynamic)[np.asarray(episodes.valid)]
    assert (rows >= schema.LOW).all()
    assert (rows <= schema.HIGH).all()
    at = schema.INDEX
    assert (rows[:, at["sysbp"]] >= rows[:, at["meanbp"]]).mean() > 0.995
    assert (rows[:, at["meanbp"]] >= rows[:, at["diabp"]]).mean() > 0.995


def test_episodes_survive_the_table(world):
    few = world[0].select(slice(0, 50))
    back = from_table(to_table(few))
    steps = back.num_steps
    np.testing.assert_array_equal(back.dynamic, few.dynamic[:, :steps])
    np.testing.assert_array_equal(back.action, few.action[:, :steps])


def test_levels_are_the_levels_of_the_doses(world):
    episodes, _ = world
    valid = np.asarray(episodes.valid)
    edges = schema.DEFAULT_DOSE_EDGES
    for level, dose, limits in (
        (episodes.vasopressor, episodes.vasopressor_dose, edges.vasopressor),
        (episodes.fluid, episodes.fluid_dose, edges.fluid),
    ):
        np.testing.assert_array_equal(
            schema.dose_level(np.asarray(dose)[valid], limits), np.asarray(level)[valid]
        )


def test_gaps_are_filled_as_in_records(world):
    """Observations during simulation equal `imputation.impute` of the raw records."""
    episodes, truth = world
    measured = np.concatenate(
        [np.asarray(episodes.measured), np.ones((*episodes.measured.shape[:2], 1), bool)], axis=-1
    )
    raw = np.where(measured, np.asarray(episodes.dynamic), np.nan)
    filled, _ = imputation.impute(
        raw, np.asarray(episodes.length), np.asarray(truth.params.observation.fill)
    )
    np.testing.assert_array_equal(filled, np.asarray(episodes.dynamic))


def test_fill_values_are_near_the_training_medians(world):
    episodes, truth = world
    table = marginals(episodes.of_split("train"))
    gap = (truth.params.observation.fill - table["median"]) / table["published_std"]
    assert gap.drop(["output_4hourly", "gcs_verbal"]).abs().max() < 0.35


def test_reward_and_urine_are_those_of_the_clinical_rules(world):
    episodes, truth = world
    expected = reward.trajectory_rewards(
        episodes.sofa,
        episodes.dynamic[..., schema.INDEX["lactate"]],
        episodes.length,
        episodes.died_90d,
    )
    np.testing.assert_array_equal(expected, truth.reward)
    urine = sofa.urine_24h(episodes.dynamic[..., schema.URINE])
    valid = np.asarray(episodes.valid)
    np.testing.assert_allclose(
        np.asarray(urine)[valid], np.asarray(episodes.urine_24h)[valid], rtol=1e-5
    )


def test_sofa_counts_the_vasopressor_of_the_step_before(world):
    episodes, _ = world
    running = np.pad(np.asarray(episodes.vasopressor_dose), ((0, 0), (1, 0)))[:, :-1]
    score = sofa.standard(
        episodes.dynamic,
        ventilated=episodes.ventilated,
        vasopressor_dose=running,
        urine_24h=episodes.urine_24h,
    )
    valid = np.asarray(episodes.valid)
    np.testing.assert_array_equal(np.asarray(score.total)[valid], np.asarray(episodes.sofa)[valid])


def test_mortality_and_splits(world):
    episodes, _ = world
    died = np.asarray(episodes.died_90d)
    assert 0.25 < died.mean() < 0.40
    assert (died >= np.asarray(episodes.died_in_hospital)).all()
    shares = np.bincount(np.asarray(episodes.split), minlength=3) / len(died)
    np.testing.assert_allclose(shares, (0.70, 0.15, 0.15), atol=0.03)


def test_marginals_resemble_the_published_ones(world):
    table = marginals(world[0]).drop(list(EXEMPT))
    good = (table["shift"].abs() <= 0.25) & table["ratio"].between(0.7, 1.4)
    print(table.round(2).to_string())
    assert good.mean() >= 0.9, table[~good]
    assert table["shift"].abs().max() < 0.5
    assert table["ratio"].between(0.5, 2.0).all()


# Feature: its figure in the records of MIMIC-IV demo 2.2 (40 septic stays), and what is near.
AUTOCORRELATION = {
    "heart_rate": (0.88, 0.06), "resp_rate": (0.81, 0.08), "spo2": (0.71, 0.08),
    "temp_c": (0.73, 0.08), "gcs_eye": (0.85, 0.08), "gcs_verbal": (0.94, 0.08),
    "gcs_motor": (0.86, 0.09), "pao2": (0.75, 0.08), "ph": (0.85, 0.12),
    "lactate": (0.91, 0.06), "output_4hourly": (0.46, 0.08),
}  # fmt: skip
MEASURED = {
    "lactate": (0.28, 0.03), "gcs_eye": (0.80, 0.03), "pao2": (0.29, 0.04), "fio2": (0.61, 0.06),
}  # fmt: skip


def test_values_persist_as_in_records(world):
    found = recorded_statistics(world[0])["autocorrelation"]
    for name, (value, near) in AUTOCORRELATION.items():
        assert found[name] == pytest.approx(value, abs=near), name


def test_values_are_recorded_as_often_as_in_records(world):
    found = recorded_statistics(world[0])["measured"]
    for name, (value, near) in MEASURED.items():
        assert found[name] == pytest.approx(value, abs=near), name


def test_spreads_and_tails_resemble_the_records(world):
    """MAP, lactate, white cells and ALT; the demo's tails of the latter two are single patients."""
    found = recorded_statistics(world[0])
    assert 0.85 < found.loc["meanbp", "std"] / 10.4 < 1.25
    assert 0.75 < found.loc["lactate", "std"] / 2.21 < 1.1
    assert found.loc["lactate", "high"] == pytest.approx(10.9, rel=0.25)
    # Quantiles at 99.5% of the published cohort: 38.6 and 3173.
    assert 30 < found.loc["wbc", "high"] < 45
    assert found.loc["alt", "high"] > 1600


def test_stays_pass_as_in_records(world):
    found = stay_statistics(world[0])
    assert found["sofa_unchanged"] > 0.44
    assert found["fluid_unchanged"] == pytest.approx(0.58, abs=0.05)
    assert found["vasopressor_unchanged"] > 0.78
    assert found["full"] == pytest.approx(0.68, abs=0.05)
    assert abs(found["fluid_meanbp"]) < 0.2


def test_statistics_are_those_of_the_recorded_rows(world):
    """By hand, on a few stays; what was filled does not count."""
    few = world[0].select(slice(0, 40))
    values, seen = [], np.asarray(few.measured)[..., schema.INDEX["lactate"]]
    pairs = []
    for stay, length in enumerate(np.asarray(few.length)):
        row = np.asarray(few.dynamic)[stay, :length, schema.INDEX["lactate"]]
        values += list(row[seen[stay, :length]])
        pairs += [
            (row[t], row[t + 1]) for t in range(length - 1) if seen[stay, t] and seen[stay, t + 1]
        ]
    found = recorded_statistics(few).loc["lactate"]
    assert found["measured"] == pytest.approx(len(values) / np.asarray(few.length).sum())
    assert found["std"] == pytest.approx(np.std(values), rel=1e-5)
    assert found["autocorrelation"] == pytest.approx(np.corrcoef(np.array(pairs).T)[0, 1], rel=1e-4)
    fluid, length = np.asarray(few.fluid), np.asarray(few.length)
    same = [fluid[i, t] == fluid[i, t + 1] for i, n in enumerate(length) for t in range(n - 1)]
    assert stay_statistics(few)["fluid_unchanged"] == pytest.approx(np.mean(same))


def test_blood_gases_obey_henderson_hasselbalch(world):
    """pH, PaCO2 and total CO2 of one sample agree up to their display precision."""
    episodes, _ = world
    rows = np.asarray(episodes.dynamic)[np.asarray(episodes.measured)[..., schema.INDEX["ph"]]]
    ph, co2, total = (rows[:, schema.INDEX[n]] for n in ("ph", "paco2", "total_co2"))
    expected = 6.1 + np.log10((total - 0.0307 * co2) / (0.0307 * co2))
    assert np.abs(ph - expected).max() < 0.10
    assert np.abs(ph - expected).mean() < 0.012


def test_next_state_is_predictable(world):
    """A linear map of the row and the treatment beats carrying the last value forward.

    The more a value persists, the less there is to win.
    """
    x, y, train = _transitions(world[0])
    weights = np.linalg.lstsq(x[train], y[train], rcond=None)[0]
    error = np.abs(x[~train] @ weights - y[~train]).mean(0)
    carried = np.abs(x[~train][:, : schema.NUM_FEATURES] - y[~train]).mean(0)
    shares = {"meanbp": 0.95, "heart_rate": 0.98, "resp_rate": 0.98, "spo2": 1.0}
    for name, share in shares.items():
        assert error[schema.INDEX[name]] < share * carried[schema.INDEX[name]]


def _transitions(episodes):
    """z-scored rows and treatments [M, 39 + 24 + 1], next rows [M, 39], train mask [M]."""
    rows = np.asarray(episodes.dynamic, np.float64)
    pair = np.asarray(episodes.valid)[:, 1:]
    std = rows[np.asarray(episodes.valid)].std(0)
    now, after = (rows[:, :-1] / std)[pair], (rows[:, 1:] / std)[pair]
    action = np.eye(schema.NUM_ACTIONS)[np.asarray(episodes.action)[:, :-1][pair]][:, 1:]
    train = np.broadcast_to((np.asarray(episodes.split) == 0)[:, None], pair.shape)[pair]
    return np.concatenate([now, action, np.ones((len(now), 1))], 1), after, train


def test_bad_requests_are_refused():
    with pytest.raises(InputError, match="at least 1"):
        generate(WORLD, 0)
    with pytest.raises(InputError, match="multiple of 64"):
        generate(WORLD, 10, block=100)


def test_extreme_patients_are_finite():
    """These come to the unit with the highest lactate of 20,000, and once with no bicarbonate."""
    episodes, truth = generate_patients(jax.random.key(22), np.array([2657, 13601]), None)
    for leaf in jax.tree.leaves((episodes.dynamic, truth.latent, truth.probabilities)):
        assert np.isfinite(leaf).all()
    assert np.asarray(truth.latent.bicarbonate)[:, 0].min() >= 4.0
    assert np.asarray(truth.latent.lactate)[:, 0].max() > 15.0
