"""Rules on whole trajectories: rates known by hand, padding, and every denominator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.clinical import safety
from worldmodel.clinical.safety import Prescriptions, SafetyConfig, assess, assess_episodes
from worldmodel.errors import InputError

# Two stays. Columns: MAP, lactate, PaO2 at FiO2 50 %, vasopressor, fluid, volume in mL.
LONG = [
    (60.0, 2.0, 200.0, 0, 0, 0.0),  # G1; early fluid missed; below 65
    (54.0, 4.0, 200.0, 0, 2, 80.0),  # underdosed: 20 mL/h and no vasopressor
    (65.0, 2.0, 200.0, 3, 0, 0.0),  # G2 (0 -> 3), dose jump
    (96.0, 1.0, 90.0, 4, 3, 600.0),  # G2 (3 -> 4), overdosed, P/F 180 with fluid, high MAP
    (80.0, 1.0, 200.0, 0, 0, 0.0),  # abrupt stop, dose jump
]
SHORT = [
    (65.0, 2.0, 200.0, 4, 0, 0.0),  # at t = 0 nothing is a change
    (95.0, 2.0, 100.0, 4, 3, 10.0),  # neither above 95 nor a P/F below 200; above 90
]


def arrays(*stays, width=6, padding=7.0):
    """Trajectories as `assess` takes them, with odd values where a stay has ended."""
    dynamic = np.full((len(stays), width, 39), padding, np.float32)
    action = np.full((len(stays), width), 24)
    dose, valid = np.full((len(stays), width), 9e9, np.float32), np.zeros((len(stays), width), bool)
    dynamic[..., schema.INDEX["fio2"]] = 50.0
    for i, rows in enumerate(stays):
        for t, (meanbp, lactate, pao2, vasopressor, fluid, volume) in enumerate(rows):
            dynamic[i, t, schema.INDEX["meanbp"]] = meanbp
            dynamic[i, t, schema.INDEX["lactate"]] = lactate
            dynamic[i, t, schema.INDEX["pao2"]] = pao2
            action[i, t] = schema.action_index(vasopressor, fluid)
            dose[i, t], valid[i, t] = volume, True
    return tuple(map(jnp.asarray, (dynamic, action, dose, valid)))


def test_rates_by_hand():
    table = assess(*arrays(LONG, SHORT)).table()
    counts = {
        name.removesuffix("_count"): n for name, n in table.items() if name.endswith("_count")
    }
    assert table["prescriptions"] == 7 and table["stays"] == 2
    assert counts == {
        "unsafe": 2, "g1": 1, "g2": 2, "underdosing": 1, "overdosing": 1,
        "underdosing_festor_a": 1, "underdosing_map_55": 0, "underdosing_map_60": 0,
        "underdosing_map_65": 1, "underdosing_map_65_untreated": 1,
        "overdosing_festor_b": 1, "overdosing_map_85": 2, "overdosing_map_95_high": 1,
        "dose_jump": 2, "abrupt_stop": 1, "early_fluid_missed": 1, "fluid_overload": 1,
        "vasopressor_at_high_map": 2,
    }  # fmt: skip
    exposed = {name: table[f"{name}_exposed"] for name in counts if name != "unsafe"}
    assert exposed == {
        "g1": 2, "g2": 4, "underdosing": 1, "overdosing": 1,
        "underdosing_festor_a": 1, "underdosing_map_55": 1, "underdosing_map_60": 1,
        "underdosing_map_65": 2, "underdosing_map_65_untreated": 2,
        "overdosing_festor_b": 1, "overdosing_map_85": 2, "overdosing_map_95_high": 1,
        "dose_jump": 5, "abrupt_stop": 3, "early_fluid_missed": 1, "fluid_overload": 1,
        "vasopressor_at_high_map": 2,
    }  # fmt: skip
    assert table["adherence"] == pytest.approx(100 * 4 / 7)
    assert table["unsafe"] == pytest.approx(100 * 2 / 7)
    assert table["g1_of_exposed"] == pytest.approx(50.0)
    assert table["hours_below_65"] == pytest.approx(4.0)  # 8 h and 0 h
    assert table["area_below_65"] == pytest.approx(4 * (5 + 11) / 2)
    assert table["lactate_clearance"] == pytest.approx(100 * (0.5 + 0.0) / 2)
    assert np.isnan(table["raised_lactate_clearance"])  # both start at 2.0 exactly


def test_the_clearance_of_raised_lactate_leaves_out_the_others():
    low = [(70.0, 1.0, 200.0, 0, 1, 0.0), (70.0, 0.5, 200.0, 0, 1, 0.0)]
    high = [(70.0, 4.0, 200.0, 0, 1, 0.0), (70.0, 3.0, 200.0, 0, 1, 0.0)]
    alone = [(70.0, 9.0, 200.0, 0, 1, 0.0)]
    table = assess(*arrays(low, high, alone)).table()
    assert table["raised_lactate_clearance"] == pytest.approx(25.0)
    assert table["lactate_clearance"] == pytest.approx(37.5)


def test_padding_and_empty_trajectories_count_for_nothing():
    plain = assess(*arrays(LONG, SHORT)).table()
    for odd in (np.nan, 0.0, 1e9):
        assert assess(*arrays(LONG, SHORT, [], width=9, padding=odd)).table() == pytest.approx(
            plain, nan_ok=True
        )


def test_nothing_prescribed_gives_no_rate():
    table = assess(*arrays([], [])).table()
    assert table["prescriptions"] == table["stays"] == 0
    assert np.isnan([table["adherence"], table["g1"], table["unsafe"]]).all()


def test_volume_given_before_counts_from_the_step_after():
    row = (70.0, 1.0, 250.0, 0, 4, 5_000.0)
    three = [row, row, (70.0, 1.0, 250.0, 0, 3, 1.0)]  # 10 L exactly: at the limit
    assert assess(*arrays(three)).table()["fluid_overload_count"] == 0
    four = [row, row, (70.0, 1.0, 250.0, 0, 1, 1.0), (70.0, 1.0, 250.0, 0, 3, 1.0)]
    table = assess(*arrays(four)).table()
    assert (table["fluid_overload_count"], table["fluid_overload_exposed"]) == (1, 1)


def test_the_length_of_a_step_sets_rates_and_hours():
    table = assess(*arrays(LONG, SHORT), step_hours=1.0).table()
    assert table["hours_below_65"] == pytest.approx(1.0)
    assert table["underdosing_count"] == 0  # 80 mL within an hour
    assert table["early_fluid_missed_exposed"] == 2  # the second step begins at hour 1


def test_thresholds_are_the_configurations():
    given = arrays(LONG, SHORT)
    config = SafetyConfig(
        underdosing="map_65_untreated", overdosing="map_85", jump_levels=4, stop_from=5,
        overload_pf=50.0, high_map=95.5,
    )  # fmt: skip
    table = assess(*given, config=config).table()
    assert [table[f"{n}_count"] for n in ("underdosing", "overdosing", "unsafe")] == [1, 2, 3]
    assert [table[f"{n}_count"] for n in ("dose_jump", "abrupt_stop", "fluid_overload")] == [
        1,
        0,
        0,
    ]
    assert table["vasopressor_at_high_map_count"] == 1
    with pytest.raises(InputError, match="festor_a"):
        SafetyConfig(underdosing="festor")


def test_episodes_are_assessed_as_their_arrays():
    episodes = toy_episodes(20, 7)
    mine = assess_episodes(episodes).table()
    meanbp = np.asarray(episodes.dynamic)[..., schema.INDEX["meanbp"]]
    lactate = np.asarray(episodes.dynamic)[..., schema.INDEX["lactate"]]
    valid, vasopressor = np.asarray(episodes.valid), np.asarray(episodes.vasopressor)
    g1 = g2 = 0
    for i, t in np.argwhere(valid):
        poor = lactate[i, t] > 2 or meanbp[i, t] < 65
        g1 += poor and vasopressor[i, t] == 0 and episodes.fluid[i, t] == 0
        g2 += t > 0 and meanbp[i, t] >= 65 and vasopressor[i, t] > vasopressor[i, t - 1]
    assert (mine["g1_count"], mine["g2_count"]) == (g1, g2) and g2 > 0
    assert mine["adherence"] == pytest.approx(100 * (valid.sum() - g1 - g2) / valid.sum())


def test_leading_axes_are_pooled_and_kept_in_what_belongs_to_a_trajectory():
    given = arrays(LONG, SHORT, LONG, SHORT)
    nested = tuple(x.reshape(2, 2, *x.shape[1:]) for x in given)
    report = jax.jit(assess)(*nested)
    assert report.hours_below_65.shape == (2, 2)
    assert report.table() == pytest.approx(assess(*given).table(), nan_ok=True)


def test_a_late_start_knows_what_was_given_before():
    one = jnp.ones((1, 1), jnp.int32)
    given = Prescriptions(
        meanbp=70.0 * one, lactate=one * 1.0, pf_ratio=400.0 * one, vasopressor=0 * one,
        previous_vasopressor=3 * one, fluid=3 * one, fluid_dose=1.0 * one,
        cumulative_fluid=10_001.0 * one, step=5 * one, valid=one > 0,
    )  # fmt: skip
    table = safety.judge(given).table()
    assert (table["abrupt_stop"], table["fluid_overload"], table["g2"]) == (100.0, 100.0, 0.0)
