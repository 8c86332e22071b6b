"""Episodes from one's own table: what is given is kept, what is absent is derived."""

import json
from dataclasses import fields

import jax
import numpy as np
import pandas as pd
import pytest

from sepsis_jax.cohort.build import split_of
from sepsis_jax.cohort.own_table import OwnTableOptions, describe_columns, own_cohort
from sepsis_jax.pipelines.episodes import TEMPLATE_PATIENTS, make_own_cohort, write_template
from tests.sepsis_jax.command_line import FAST, call, finish, leftovers, refuse
from worldmodel import schema
from worldmodel.episode_files import load_dose_edges, load_episodes, to_table
from worldmodel.episodes import COLUMNS, MASK_NAMES, Episodes
from worldmodel.errors import InputError, TableError
from worldmodel.schema import INDEX
from worldmodel.synthetic import generate

TRAIN = OwnTableOptions(split=(1.0, 0.0, 0.0))
DERIVED = (
    "subject_id", "split", *MASK_NAMES, "vasopressor_level", "fluid_level", "sofa", "urine_24h",
    "behavior_prob",
)  # fmt: skip
# A patient with SOFA 0 in every row.
WELL = {
    "heart_rate": 80, "meanbp": 80, "spo2": 98, "temp_c": 37.0, "fio2": 21, "pao2": 95,
    "gcs_eye": 4, "gcs_verbal": 5, "gcs_motor": 6, "creatinine": 1.0, "bilirubin_total": 0.6,
    "platelet": 200, "lactate": 1.0, "output_4hourly": 300,
}  # fmt: skip
OTHERS = {
    "age": 60, "male": 1, "charlson": 3, "vasopressor_dose": 0.0, "fluid_ml": 0.0, "ventilated": 0,
    "died_90d": 0, "died_in_hospital": 0,
}  # fmt: skip


def minimal(steps=3, stays=1, **columns):
    """The columns that are needed, for stays of equal length; lists are values by row."""
    rows = steps * stays
    table = pd.DataFrame({"stay_id": np.arange(rows) // steps + 7, "step": np.arange(rows) % steps})
    return table.assign(**(WELL | OTHERS | columns))


def feature(episodes, name, stay=0):
    return np.asarray(episodes.dynamic)[stay, :, INDEX[name]].tolist()


def same(one: Episodes, other: Episodes):
    for field in fields(Episodes):
        a, b = (np.asarray(getattr(each, field.name)) for each in (one, other))
        np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.fixture(scope="module")
def synthetic():
    return generate(jax.random.key(0), TEMPLATE_PATIENTS, keep_latent=False)[0]


@pytest.mark.parametrize("name", ["own.csv", "own.parquet"])
def test_the_template_becomes_the_episodes_that_it_was_made_of(capsys, tmp_path, synthetic, name):
    table, out = tmp_path / name, tmp_path / "own"
    said = call(capsys, "cohort", "template", "--out", table, "--json").last_json
    assert [line["column"] for line in said["columns"]] == list(COLUMNS)
    assert call(capsys, "cohort", "check", "--table", table).status == 0
    result = call(capsys, "cohort", "table", "--table", table, "--out", out, "--json")
    assert result.status == 0, result.err
    same(load_episodes(out), synthetic)
    assert load_dose_edges(out) == schema.DEFAULT_DOSE_EDGES
    made = result.last_json
    assert made["derived"] == {} and made["counts"]["converted"] == {}
    measured = int(np.asarray(synthetic.measured).sum() + np.asarray(synthetic.length).sum())
    assert (made["counts"]["measured"], made["counts"]["filled"]) == (measured, 0)
    refuse(call(capsys, "cohort", "template", "--out", table), "exists; choose another name")


def test_columns_tell_their_unit_range_and_what_is_done_without(capsys, tmp_path):
    lines = {line["column"]: line for line in describe_columns()}
    needed = {"stay_id", "step", *OTHERS}
    assert {name for name, line in lines.items() if not line["optional"]} == needed
    assert lines["creatinine"]["unit"] == "mg/dL" and lines["creatinine"]["range"] == "0.1 to 30"
    assert lines["vasopressor_dose"]["range"] == "0 or more"
    shown = call(capsys, "cohort", "template", "--out", tmp_path / "own.csv").out
    assert "creatinine" in shown and "mg/dL" in shown and "needed" in shown


def test_derived_columns_of_a_synthetic_cohort(synthetic):
    """The synthetic world measures and derives by the same rules, so that all of it comes back."""
    table = to_table(synthetic).drop(columns=["sofa", "urine_24h"])
    made = own_cohort(table)
    np.testing.assert_array_equal(made.episodes.sofa, synthetic.sofa)
    np.testing.assert_allclose(made.episodes.urine_24h, synthetic.urine_24h, rtol=1e-5)
    assert set(made.derived) == {"sofa", "urine_24h"}
    edges = {
        f"{name}_edges": getattr(schema.DEFAULT_DOSE_EDGES, name)
        for name in ("vasopressor", "fluid")
    }
    made = own_cohort(to_table(synthetic).drop(columns=list(DERIVED)), OwnTableOptions(**edges))
    for name in ("vasopressor", "fluid", "sofa"):
        np.testing.assert_array_equal(getattr(made.episodes, name), getattr(synthetic, name))
    assert np.asarray(made.episodes.measured)[np.asarray(synthetic.valid)].all()
    assert set(made.derived) == set(DERIVED) and made.edges == schema.DEFAULT_DOSE_EDGES


def test_sofa_knows_the_vasopressor_of_the_step_before():
    table = minimal(4, vasopressor_dose=[0.0, 0.2, 0.05, 0.0])
    assert own_cohort(table, TRAIN).episodes.sofa[0].tolist() == [0, 0, 4, 3]
    # Hypotension 1, creatinine of 2.0 2, bilirubin of 1.2 1, verbal response missing 1.
    table = minimal(1, meanbp=69, creatinine=2.0, bilirubin_total=1.2, gcs_verbal=4)
    assert own_cohort(table, TRAIN).episodes.sofa[0].tolist() == [5]
    assert own_cohort(table.assign(sofa=9), TRAIN).episodes.sofa[0].tolist() == [9]


def test_urine_of_24_hours():
    urine = [100, 50, 0, 60, 30, 60, 10]
    made = own_cohort(minimal(7, output_4hourly=urine), TRAIN).episodes
    # Scaled up from 1, 2, ... 6 rows of 4 h; the seventh row has its own six.
    expected = [600, 450, 300, 315, 288, 300, 210]
    np.testing.assert_allclose(made.urine_24h[0], expected)
    # Below 500 mL: 3 points; below 200: 4, of which there is none.
    assert made.sofa[0].tolist() == [0, 3, 3, 3, 3, 3, 3]
    made = own_cohort(minimal(7, output_4hourly=urine, urine_24h=1e3), TRAIN).episodes
    assert made.urine_24h[0].tolist() == [1000] * 7 and not made.sofa.any()
    hourly = own_cohort(minimal(2, output_4hourly=[10, 30]), OwnTableOptions(1.0, split=(1, 0, 0)))
    np.testing.assert_allclose(hourly.episodes.urine_24h[0], [240, 480])


def test_gaps_are_held_then_filled_with_the_training_median():
    nan = np.nan
    lactate = [nan, 2, nan, nan, nan, 4]  # 8 h are two steps
    made = own_cohort(minimal(6, lactate=lactate), TRAIN)
    assert feature(made.episodes, "lactate") == [3, 2, 2, 2, 3, 4]
    mask = np.asarray(made.episodes.measured)[0, :, INDEX["lactate"]]
    assert mask.tolist() == [False, True, False, False, False, True]
    counts = made.counts
    absent = schema.NUM_FEATURES - len(WELL)
    assert counts["measured"] == 6 * (len(WELL) - 1) + 2
    assert (counts["held"], counts["filled"]) == (2, 2 + 6 * absent)
    assert counts["measured_by_feature"]["lactate"] == 2
    assert "albumin" in made.notes[0] and "lactate" not in made.notes[0]
    assert made.derived["albumin"] == "typical value" and "lactate" not in made.derived
    forever = OwnTableOptions(carry_forever=True, split=(1.0, 0.0, 0.0))
    held = own_cohort(minimal(6, lactate=lactate), forever).episodes
    assert feature(held, "lactate") == [3, 2, 2, 2, 2, 4]
    # Values of other splits do not matter.
    two = minimal(2, 2, spo2=[nan, 90, 60, 60], split=["train"] * 2 + ["test"] * 2)
    assert feature(own_cohort(two).episodes, "spo2") == [90, 90]
    only_test = own_cohort(two.assign(spo2=[nan, nan, 60, 60]))
    assert feature(only_test.episodes, "spo2") == [97, 97] and "spo2" in only_test.notes[0]


def test_missing_urine():
    urine = [np.nan, 100, np.nan, 300]
    made = own_cohort(minimal(4, output_4hourly=urine), TRAIN)
    assert feature(made.episodes, "output_4hourly") == [100, 100, 0, 300]  # median of 100, 0, 300
    assert made.counts["urine_set_to_zero"] == 1 and "output_4hourly" not in made.notes[0]
    impute = OwnTableOptions(missing_urine="impute", split=(1.0, 0.0, 0.0))
    made = own_cohort(minimal(4, output_4hourly=urine), impute)
    assert feature(made.episodes, "output_4hourly") == [200, 100, 100, 300]
    # Where no urine is recorded at all, a patient without urine would be made up.
    for hours, typical in ((4.0, 100), (8.0, 200)):
        options = OwnTableOptions(hours, split=(1.0, 0.0, 0.0))
        made = own_cohort(minimal(2).drop(columns="output_4hourly"), options)
        assert feature(made.episodes, "output_4hourly") == [typical] * 2
        assert not made.episodes.sofa.any() and "output_4hourly" in made.notes[0]


def test_levels_are_quartiles_of_the_training_stays_doses():
    split = ["train"] * 8 + ["test"] * 8
    fluid = [0, 100, 200, 300, 400, 500, 600, 700, 0, 50, 9000, 0, 0, 0, 0, 400]
    made = own_cohort(minimal(8, 2, split=split, fluid_ml=fluid))
    assert made.edges.fluid == (250, 400, 550)
    assert made.episodes.fluid.tolist() == [[0, 1, 1, 2, 2, 3, 4, 4], [0, 1, 4, 0, 0, 0, 0, 2]]
    assert made.edges.vasopressor == schema.DEFAULT_DOSE_EDGES.vasopressor
    assert "No training stay received a vasopressor" in made.notes[-2]
    options = OwnTableOptions(fluid_edges=(100.0, 200.0, 600.0))
    assert made.derived["fluid_level"] == "from the dose, with the edges 250, 400, 550"
    given = own_cohort(minimal(8, 2, split=split, fluid_ml=fluid), options)
    assert given.episodes.fluid[0].tolist() == [0, 1, 2, 3, 3, 3, 3, 4]


def test_given_levels_are_kept_and_their_edges_found():
    dose = [0, 0.1, 0.2, 0.3, 0.4, 0.5]

    def made(level, **options):
        table = minimal(6, vasopressor_dose=dose, vasopressor_level=level)
        return own_cohort(table, OwnTableOptions(split=(1.0, 0.0, 0.0), **options))

    quartiles = [0, 1, 1, 2, 3, 4]
    assert made(quartiles).edges.vasopressor == pytest.approx((0.2, 0.3, 0.4))
    assert made([0, 2, 2, 3, 3, 4]).edges == schema.DEFAULT_DOSE_EDGES
    other = made([0, 2, 3, 3, 3, 4])
    assert other.edges.vasopressor == pytest.approx((0.05, 0.1, 0.4))
    assert other.episodes.vasopressor[0].tolist() == [0, 2, 3, 3, 3, 4]
    edges = {"vasopressor_edges": (0.1, 0.2, 0.3)}
    assert made([0, 1, 2, 3, 4, 4], **edges).episodes.vasopressor[0].tolist() == [0, 1, 2, 3, 4, 4]
    with pytest.raises(TableError, match=r"vasopressor_level does not follow .* 0\.1, 0\.2, 0\.3;"):
        made(quartiles, **edges)
    with pytest.raises(TableError, match="level 0 is no dose"):
        made([1, 1, 1, 2, 3, 4])


def test_the_split_is_by_patient_and_seed():
    table = minimal(2, 40, subject_id=np.repeat(np.arange(20) + 500, 4))
    for seed in (0, 1):
        episodes = own_cohort(table, OwnTableOptions(seed=seed)).episodes
        expected = split_of(np.repeat(np.arange(20) + 500, 2), (0.7, 0.15, 0.15), seed)
        assert episodes.split.tolist() == expected.tolist()
        assert episodes.subject_id.tolist() == np.repeat(np.arange(20) + 500, 2).tolist()
    alone = own_cohort(minimal(2, 40)).episodes
    assert alone.subject_id.tolist() == alone.stay_id.tolist() == list(range(7, 47))


@pytest.mark.parametrize("name", ["own.csv", "own.parquet"])
def test_other_units_give_the_same_episodes(capsys, tmp_path, synthetic, name):
    table = to_table(synthetic)
    table["creatinine"] = table["creatinine"].astype(float) * 10_000 / 113.12  # g/mol
    table["temp_c"] = table["temp_c"].astype(float) * 1.8 + 32
    path, out = tmp_path / name, tmp_path / "own"
    table.to_csv(path, index=False) if name.endswith("csv") else table.to_parquet(path)
    units = ("--unit", "creatinine=µmol/L", "--unit", "temp_c=°F")
    refuse(call(capsys, "cohort", "table", "--table", path, "--out", out), "2 problems")
    assert call(capsys, "cohort", "check", "--table", path, *units).status == 0
    result = call(capsys, "cohort", "table", "--table", path, "--out", out, *units, "--json")
    rows = len(table)
    assert result.last_json["counts"]["converted"] == {"creatinine": rows, "temp_c": rows}
    np.testing.assert_allclose(load_episodes(out).dynamic, synthetic.dynamic, rtol=1e-5)
    options = json.loads((out / "manifest.json").read_text())["options"]
    assert options["units"] == ["creatinine=µmol/L", "temp_c=°F"]


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("creatinine=stone", r"'stone' is unknown for creatinine; expected one of mg/dl, .*umol/l"),
        ("colour=mg/dL", "'colour' has no unit to give; expected one of heart_rate, .*creatinine"),
        ("gcs_eye=points", "'gcs_eye' has no unit"),
        ("creatinine", "not FEATURE=UNIT"),
        ("creatinine=", "not FEATURE=UNIT"),
    ],
)
def test_unknown_units_are_refused(unit, message):
    with pytest.raises(InputError, match=f"^units: .*{message}"):
        OwnTableOptions(units=(unit,))


def test_every_problem_is_named(capsys, tmp_path):
    table = minimal(3, 2, temp_c=98.6, lactate=["low"] * 6, pao2=np.inf, ph=np.nan, ph_measured=1)
    table.loc[2, "fluid_ml"] = np.nan
    table.loc[4, ["step", "age"]] = (7, 61)
    table = table.drop(columns=["charlson", "spo2"]).assign(Sodium=140)
    named = (
        "columns missing: charlson",
        "column temp_c holds 98.6 in row 0; expected 25 to 43 degC",
        "column lactate is not numeric",
        "column pao2 is NaN or infinite in row 0",
        "column fluid_ml is NaN or infinite in row 2",
        "steps of stay 8 are not 0, 1, 2",
        "column age changes within stay 8",
        "column ph_measured holds 1 in row 0, where ph is empty",
        "column spo2 is missing, of which a unit is given",
    )
    path, out = tmp_path / "own.csv", tmp_path / "own"
    table.to_csv(path, index=False)
    result = call(capsys, "cohort", "check", "--table", path, "--unit", "spo2=fraction", "--json")
    found = result.last_json["problems"]
    assert result.status == 2 and len(found) == len(named)
    assert all(any(name in problem for problem in found) for name in named)
    arguments = ("cohort", "table", "--table", path, "--unit", "spo2=fraction", "--out", out)
    result = call(capsys, *arguments)
    refuse(result, "own.csv: 9 problems, listed above")
    assert all(name in " ".join(result.out.split()) for name in named)
    assert call(capsys, *arguments, "--json").last_json == {"problems": found}
    assert leftovers(tmp_path) == ["own.csv"]
    with pytest.raises(TableError) as error:
        make_own_cohort(path, out, OwnTableOptions(units=("spo2=fraction",)))
    assert len(error.value.problems) == 9


def test_tables_without_rows_features_or_training_stays_are_refused():
    with pytest.raises(TableError, match="no rows"):
        own_cohort(minimal().iloc[:0])
    with pytest.raises(TableError, match="no column of a feature"):
        own_cohort(minimal().drop(columns=list(WELL)))
    with pytest.raises(TableError, match="training split is empty"):
        own_cohort(minimal(split="test"))
    with pytest.raises(TableError, match="more than one split"):
        own_cohort(minimal(1, 2, subject_id=1, split=["train", "test"]))


def test_kinds_of_gaps_and_numbers_of_other_programs():
    plain = minimal(3, lactate=[1.0, np.nan, 3.0])
    databases = plain.assign(
        lactate=pd.array([1, None, 3], dtype="Int64"),
        ventilated=[False, False, False],
        albumin=[None] * 3,
        stay_id=plain["stay_id"].astype("Int64"),
        step=plain["step"].astype("int8"),
    )
    same(own_cohort(databases, TRAIN).episodes, own_cohort(plain, TRAIN).episodes)
    shuffled = plain.sample(frac=1, random_state=1)
    same(own_cohort(shuffled, TRAIN).episodes, own_cohort(plain, TRAIN).episodes)
    far = own_cohort(plain.assign(stay_id=2**60 + 1), TRAIN).episodes
    assert far.stay_id.tolist() == far.subject_id.tolist() == [2**60 + 1]


def test_columns_that_are_not_used_are_named():
    assert (
        own_cohort(minimal(1, Lactate=2.0), TRAIN).notes[0] == "Columns that are not used: Lactate."
    )


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"step_hours": 0.0}, "step_hours"),
        ({"step_hours": 48.0}, "step_hours"),
        ({"missing_urine": "guess"}, "missing_urine"),
        ({"fluid_edges": (3.0, 2.0, 1.0)}, "fluid_edges"),
        ({"split": (0.0, 0.5, 0.5)}, "split"),
    ],
)
def test_settings_are_checked(wrong, name):
    with pytest.raises(InputError, match=f"^{name}: got"):
        OwnTableOptions(**wrong)


def test_a_world_model_learns_from_a_table_of_the_least_columns(tmp_path, synthetic):
    left_out = [*DERIVED, "albumin", "output_4hourly"]
    table = to_table(synthetic).drop(columns=left_out)
    table.loc[table["step"] % 2 == 1, "lactate"] = np.nan
    split = dict(zip(table["stay_id"].unique(), [*schema.SPLITS, "train"] * 3, strict=False))
    table.assign(split=table["stay_id"].map(split)).to_csv(tmp_path / "own.csv", index=False)
    finish("cohort", "table", "--table", tmp_path / "own.csv", "--out", tmp_path / "own")
    manifest = json.loads((tmp_path / "own" / "manifest.json").read_text())
    assert manifest["source"] == "own table" and len(manifest["table"]["sha256"]) == 64
    assert set(manifest["derived"]) == {*left_out} - {"split"}
    assert manifest["counts"]["filled"] > 0 and "albumin" in manifest["notes"][0]
    finish("world-model", "train", "--episodes", tmp_path / "own", "--out", tmp_path / "model",
           *FAST, "--set", "state.epochs=1")  # fmt: skip
    assert (tmp_path / "model" / "manifest.json").exists()


def test_an_unreadable_table_or_a_place_that_is_taken_is_refused(tmp_path):
    write_template(tmp_path / "own.parquet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(InputError, match="not a folder that this would replace"):
        make_own_cohort(tmp_path / "own.parquet", tmp_path / "full")
    with pytest.raises(InputError, match=r"neither \.parquet nor \.csv"):
        write_template(tmp_path / "own.xlsx")
