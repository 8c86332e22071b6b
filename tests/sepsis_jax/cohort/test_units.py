"""Units: known ones are converted, unknown ones stop the build or are counted."""

import pytest

from sepsis_jax.cohort.units import UNITS, conversion, rate_conversion, volume_conversion
from tests.sepsis_jax.cohort.tiny import CREATININE, PO2, SALINE, Tiny
from worldmodel import schema
from worldmodel.errors import InputError

STAY = 30_000_011
# quantity, recorded value and unit, value in the schema's unit.
KNOWN = [
    ("creatinine", 120, "umol/L", 1.357),
    ("creatinine", 120, "µmol/L", 1.357),
    ("creatinine", 1.2, " MG/DL ", 1.2),
    ("bilirubin_total", 34.2, "umol/l", 2.0),
    ("bun", 10, "mmol/L", 28.0),
    ("glucose", 5.5, "mmol/L", 99.1),
    ("lactate", 18.0, "mg/dL", 2.0),
    ("calcium_total", 2.4, "mmol/L", 9.62),
    ("calcium_free", 4.8, "mg/dL", 1.198),
    ("magnesium", 0.85, "mmol/L", 2.066),
    ("magnesium", 1.7, "mEq/L", 2.066),
    ("hemoglobin", 120, "g/L", 12.0),
    ("hemoglobin", 7.45, "mmol/L", 12.0),
    ("hematocrit", 0.36, "L/L", 36.0),
    ("albumin", 35, "g/L", 3.5),
    ("platelet", 150_000, "/uL", 150.0),
    ("platelet", 150, "x10^9/L", 150.0),
    ("wbc", 8.1, "10*3/uL", 8.1),
    ("pao2", 10.0, "kPa", 75.0),
    ("meanbp", 65, "mm Hg", 65.0),
    ("temp_c", 98.6, "°F", 37.0),
    ("temp_c", 310.15, "K", 37.0),
    ("spo2", 0.97, "fraction", 97.0),
    ("alt", 40, "IU/L", 40.0),
    ("ast", 0.5, "µkat/L", 30.0),
    ("sodium", 140, "mEq/L", 140.0),
    ("weight", 176.4, "lbs", 80.0),
    ("output_4hourly", 0.3, "L", 300.0),
    ("heart_rate", 80, "bpm", 80.0),
    ("resp_rate", 18, "insp/min", 18.0),
    ("ph", 7.4, None, 7.4),
]


@pytest.mark.parametrize(("quantity", "value", "unit", "expected"), KNOWN)
def test_known_units(quantity, value, unit, expected):
    found = conversion(quantity, unit)
    assert value * found.scale + found.shift == pytest.approx(expected, rel=2e-3)


def test_every_feature_knows_the_schemas_unit():
    parts = {name for name in schema.FEATURE_NAMES if name.startswith("gcs_")}  # points
    assert set(UNITS) == set(schema.FEATURE_NAMES) - parts | {"weight"}
    for feature in schema.FEATURES:
        if feature.name not in parts:
            assert conversion(feature.name, feature.unit) == (1.0, 0.0, 0), feature.name


@pytest.mark.parametrize(
    ("expected", "unit", "rate"),
    [
        ("mcg/kg/min", "MCG/KG/MIN", (1.0, 0)),
        ("mcg/kg/min", "µg/kg/h", (1 / 60, 0)),
        ("mcg/kg/min", "mg/hour", (1000 / 60, -1)),
        ("mcg/kg/min", "ng/kg/min", (0.001, 0)),
        ("units/hour", "units/min", (60.0, 0)),
        ("units/hour", "U/hr", (1.0, 0)),
        ("units/hour", "mUnits/kg/min", (0.06, 1)),
        ("mcg/kg/min", "mL/hour", None),  # how much is in it is not known
        ("mcg/kg/min", "units/hour", None),
        ("mcg/kg/min", "kg/min", None),
        ("mcg/kg/min", None, None),
    ],
)
def test_rates(expected, unit, rate):
    found = rate_conversion(expected, unit)
    assert (found and (pytest.approx(found.scale), found.weight_power)) == rate


def test_unknown_units_are_none():
    assert conversion("creatinine", "furlong") is None
    assert conversion("temp_c", "mmHg") is None
    assert volume_conversion(SALINE, "mEq") is None
    assert volume_conversion(SALINE, "cc").scale == 1


def test_sofa_scores_the_values_of_the_features(build, feature):
    tiny = Tiny()
    for row in (tiny.septic_stay(1), tiny.septic_stay(2)):
        tiny.chart(row, 1, 223835, 50)
    tiny.tables["labevents"].clear()
    other = STAY + 10
    tiny.lab(STAY, 1, CREATININE, 200.0, unit="umol/L")  # 2.26 mg/dL: 2 points
    tiny.lab(STAY, 1, PO2, 12.0, unit="kPa", arterial=True)  # 90 mmHg of 50%: 2 points
    tiny.lab(other, 1, CREATININE, 3.0)
    tiny.lab(other, 5, CREATININE, 120.0)  # without a unit it cannot be believed
    episodes, report = build(tiny)
    assert feature(episodes, "creatinine")[0] == pytest.approx(2.262, abs=1e-3)
    assert feature(episodes, "pao2")[0] == pytest.approx(90.0, abs=0.1)
    assert episodes.sofa[0, :2].tolist() == [5, 5] and episodes.sofa[1, :2].tolist() == [3, 3]
    assert report.counts["values_left_out"] == {"outside range": {"creatinine": 1}}
    assert build(tiny, sofa_values="mimic-code")[0].sofa[1, :2].tolist() == [3, 5]


def test_unknown_units_of_results_charts_and_outputs(build, feature):
    tiny = Tiny()
    stay = tiny.septic_stay(1)
    tiny.lab(stay, 2, CREATININE, 4.0, unit="furlong")
    with pytest.raises(
        InputError, match=r"labevents.*'furlong' for creatinine item 50912 in 1 row"
    ):
        build(tiny)
    tiny.chart(stay, 2, 220210, 20, unit="Hz")
    with pytest.raises(InputError, match=r"chartevents.*valueuom has unit 'Hz' for resp_rate item"):
        build(tiny)
    tiny.output(stay, 2, 9, unit="oz")
    with pytest.raises(InputError, match=r"outputevents.*unit 'oz' for output_4hourly item 226559"):
        build(tiny)
    episodes, report = build(tiny, unknown_units="drop")
    assert feature(episodes, "creatinine")[0] == 2.5 and feature(episodes, "output_4hourly")[0] == 0
    assert report.counts["values_left_out"] == {"unknown unit": {"creatinine": 1, "resp_rate": 1}}
    for place, item in (
        ("laboratory", {"item": "creatinine item 50912", "unit": "furlong"}),
        ("charts", {"item": "resp_rate item 220210", "unit": "Hz"}),
        ("outputs", {"item": "output_4hourly item 226559", "unit": "oz"}),
    ):
        (found,) = report.counts[place]["unknown_units"]
        assert found == {"column": "valueuom", "rows": 1, **item}
