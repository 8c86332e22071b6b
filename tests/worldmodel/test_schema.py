"""Orders, actions and dose levels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldmodel import schema

# fmt: off
VITALS = [
    "heart_rate", "sysbp", "diabp", "meanbp", "resp_rate", "spo2", "temp_c", "fio2", "gcs_eye",
    "gcs_verbal", "gcs_motor",
]
LABS = [
    "albumin", "alt", "ast", "base_excess", "bicarbonate", "bilirubin_total", "bun",
    "calcium_free", "calcium_total", "chloride", "creatinine", "glucose", "hemoglobin",
    "hematocrit", "inr", "lactate", "magnesium", "paco2", "pao2", "ph", "platelet", "potassium",
    "pt", "ptt", "sodium", "total_co2", "wbc",
]
# fmt: on


def test_features_are_in_the_published_order():
    assert (len(VITALS), len(LABS)) == (11, 27)
    assert list(schema.FEATURE_NAMES) == [*VITALS, *LABS, "output_4hourly"]
    assert (schema.NUM_FEATURES, schema.URINE) == (39, 38)
    assert schema.INDEX["meanbp"] == 3 and schema.INDEX["lactate"] == 26


def test_all_but_urine_have_a_mask():
    assert list(schema.MASKED_NAMES) == [*VITALS, *LABS]
    assert schema.NUM_MASKED == 38


def test_groups_match_the_published_lists():
    groups = {f.name: f.group for f in schema.FEATURES}
    assert [name for name, group in groups.items() if group == "vital"] == VITALS
    assert [name for name, group in groups.items() if group == "lab"] == LABS
    assert groups["output_4hourly"] == "output"


def test_static_windows_and_actions_are_as_published():
    assert schema.STATIC_NAMES == ("age", "male", "charlson")
    assert (schema.STATE_WINDOW, schema.OUTCOME_WINDOW) == (6, 12)
    assert (schema.NUM_ACTIONS, schema.ACTION_WIDTH, schema.STEP_HOURS) == (25, 10, 4.0)
    assert schema.LEVEL_NAMES == ("None", "Low", "Medium", "High", "Very High")


def test_ranges_are_ordered_and_units_are_named():
    assert (schema.LOW < schema.HIGH).all()
    assert all(feature.unit and feature.hold_hours > 0 for feature in schema.FEATURES)


def test_action_index_round_trips():
    seen = []
    for vasopressor in range(5):
        for fluid in range(5):
            index = schema.action_index(vasopressor, fluid)
            assert schema.action_levels(index) == (vasopressor, fluid)
            seen.append(index)
    assert seen == list(range(25))  # vasopressor is the slow index


def test_action_name_reads_well():
    assert schema.action_name(5) == "vasopressor Low, fluid None"
    assert schema.action_name(24) == "vasopressor Very High, fluid Very High"


@pytest.mark.parametrize(
    ("dose", "level"),
    [
        (0.0, 0),
        (1e-9, 1),
        (50.0, 1),  # an edge belongs to the lower level
        (50.001, 2),
        (180.0, 2),
        (180.001, 3),
        (530.0, 3),
        (530.001, 4),
        (1e9, 4),
    ],
)
def test_dose_levels_at_their_edges(dose, level):
    assert schema.dose_level(np.array(dose), (50.0, 180.0, 530.0)) == level


def test_dose_level_keeps_the_shape():
    doses = np.array([[0.0, 60.0], [200.0, 1000.0]])
    np.testing.assert_array_equal(schema.dose_level(doses, (50.0, 180.0, 530.0)), [[0, 2], [3, 4]])


def test_default_edges_hold_for_float32_doses():
    for edges in (schema.DEFAULT_DOSE_EDGES.vasopressor, schema.DEFAULT_DOSE_EDGES.fluid):
        np.testing.assert_array_equal(
            schema.dose_level(np.array(edges, np.float32), edges), [1, 2, 3]
        )


@pytest.mark.parametrize("edges", [(0.08, 0.22, 0.45), (50.0, 180.0, 530.0)])
def test_a_levels_dose_lies_in_that_level(edges):
    doses = schema.level_doses(edges)
    np.testing.assert_array_equal(schema.dose_level(np.array(doses), edges), range(5))


def test_level_doses_by_hand():
    # 50/2, (50+180)/2, (180+530)/2, 1.5*530
    assert schema.level_doses((50.0, 180.0, 530.0)) == (0.0, 25.0, 115.0, 355.0, 795.0)


EDGES = st.lists(st.floats(0.01, 1e3, allow_nan=False), min_size=3, max_size=3, unique=True).map(
    lambda edges: tuple(sorted(edges))
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_levels_of_actions_come_back(pairs):
    vasopressor, fluid = np.array(pairs).T
    action = schema.action_index(vasopressor, fluid)
    assert ((action >= 0) & (action < schema.NUM_ACTIONS)).all()
    np.testing.assert_array_equal(schema.action_levels(action), (vasopressor, fluid))


@settings(max_examples=50, deadline=None)
@given(EDGES, st.lists(st.floats(0, 2e3), min_size=1))
def test_levels_rise_with_the_dose_and_an_edge_belongs_to_the_level_below(edges, doses):
    doses = np.sort(doses)
    level = schema.dose_level(doses, edges)
    assert (np.diff(level) >= 0).all()
    np.testing.assert_array_equal(level == 0, doses == 0)
    np.testing.assert_array_equal(schema.dose_level(np.array(edges), edges), (1, 2, 3))


@settings(max_examples=50, deadline=None)
@given(EDGES)
def test_the_dose_of_a_level_has_that_level(edges):
    doses = np.array(schema.level_doses(edges))
    np.testing.assert_array_equal(schema.dose_level(doses, edges), range(5))
