"""Episodes: round trips through files, and errors for bad ones."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.episode_files import (
    COLUMNS,
    from_table,
    load_dose_edges,
    load_episodes,
    load_manifest,
    load_scaler,
    save_episodes,
    table_problems,
    to_table,
)
from worldmodel.errors import InputError
from worldmodel.scaling import Scaler


@pytest.fixture(scope="module")
def episodes():
    toy = toy_episodes(12, 7)
    behavior = np.array(toy.behavior_prob)
    behavior[1] = np.nan  # unknown
    return replace(toy, behavior_prob=jnp.asarray(behavior) * toy.valid)


@pytest.fixture(scope="module")
def table(episodes):
    return to_table(episodes)


@pytest.fixture
def folder(episodes, tmp_path):
    return save_episodes(episodes, tmp_path / "cohort", manifest={"source": "toy"})


def assert_same(a, b):
    for name, left, right in zip(
        a.__dataclass_fields__, jax.tree.leaves(a), jax.tree.leaves(b), strict=True
    ):
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)


def on_valid(episodes):
    """Unknown probabilities are NaN on recorded rows only."""
    return replace(episodes, behavior_prob=jnp.where(episodes.valid, episodes.behavior_prob, 0.0))


def test_files_give_back_every_bit(episodes, folder):
    loaded = load_episodes(folder)
    assert_same(loaded, on_valid(episodes))
    assert np.isnan(np.asarray(loaded.behavior_prob)[1, 0])


def test_the_order_of_rows_does_not_matter(episodes, table):
    shuffled = table.sample(frac=1.0, random_state=3)
    assert not (shuffled.index == table.index).all()
    assert_same(from_table(shuffled), on_valid(episodes))


def test_padding_is_zero(episodes):
    loaded = from_table(to_table(episodes))
    padding = ~np.asarray(loaded.valid)
    assert padding.any()
    for name in ("dynamic", "measured", "vasopressor", "fluid_dose", "sofa", "behavior_prob"):
        assert not np.asarray(getattr(loaded, name))[padding].any(), name


def test_extra_padding_changes_no_row(episodes, table):
    wider = jax.tree.map(
        lambda leaf: (
            jnp.pad(leaf, [(0, 0), (0, 3), *[(0, 0)] * (leaf.ndim - 2)])
            if leaf.ndim > 1 and leaf.shape[1] == episodes.num_steps
            else leaf
        ),
        episodes,
    )
    assert wider.num_steps == episodes.num_steps + 3
    assert to_table(wider).equals(table)


def test_table_has_one_row_per_recorded_step(episodes, table):
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == int(episodes.length.sum())
    second = table[table["stay_id"] == 30_000_001]
    assert list(second["step"]) == list(range(int(episodes.length[1])))
    row = second.iloc[1]
    assert row["lactate"] == episodes.dynamic[1, 1, 26]
    assert row["fluid_level"] == episodes.fluid[1, 1]
    assert row["charlson"] == episodes.static[1, 2]


def test_splits_and_selection_pick_stays(episodes):
    splits = np.asarray(episodes.split)
    for code, name in enumerate(("train", "validation", "test")):
        part = episodes.of_split(name)
        np.testing.assert_array_equal(
            part.stay_id, np.asarray(episodes.stay_id)[splits == code], err_msg=name
        )
        assert part.num_stays > 0
    picked = episodes.select(np.array([4, 2]))
    np.testing.assert_array_equal(picked.dynamic, episodes.dynamic[jnp.array([4, 2])])


def test_joint_action_is_vasopressor_major(episodes):
    np.testing.assert_array_equal(episodes.action, 5 * episodes.vasopressor + episodes.fluid)


def test_manifest_edges_and_scaler_come_back(episodes, tmp_path):
    edges = schema.DoseEdges(vasopressor=(0.1, 0.2, 0.3), fluid=(1.0, 2.0, 3.0))
    path = save_episodes(
        episodes, tmp_path / "a", dose_edges=edges, step_hours=2.0, manifest={"source": "toy"}
    )
    manifest = load_manifest(path)
    assert (manifest["stays"], manifest["step_hours"], manifest["source"]) == (12, 2.0, "toy")
    assert manifest["rows"] == int(episodes.length.sum())
    assert load_dose_edges(path) == edges
    jax.tree.map(np.testing.assert_array_equal, load_scaler(path), Scaler.fit(episodes))


BAD_TABLES = {
    "column missing": (lambda t: t.drop(columns=["lactate", "ph"]), "missing: lactate, ph"),
    "no rows": (lambda t: t[:0], "no rows"),
    "NaN": (lambda t: t.assign(lactate=np.nan), "lactate is NaN or infinite in row 0"),
    "infinite": (lambda t: t.assign(age=np.inf), "age is NaN or infinite"),
    "text": (lambda t: t.assign(sofa="high"), "sofa is not numeric"),
    "level 7": (lambda t: t.assign(fluid_level=7), "fluid_level holds 7 in row 0"),
    "level 2.5": (lambda t: t.assign(vasopressor_level=2.5), "vasopressor_level holds 2.5"),
    "gap": (lambda t: t[t["step"] != 1], "steps of stay 30000000 are not 0, 1, 2"),
    "row twice": (lambda t: t.loc[[*t.index, t.index[-1]]], "steps of stay 30000011 are not"),
    "late start": (lambda t: t.assign(step=t["step"] + 1), "are not 0, 1, 2"),
    "split": (lambda t: t.assign(split="holdout"), "split holds holdout in row 0"),
    "no split": (lambda t: t.assign(split=None), "split holds "),
    "no stay_id": (lambda t: t.assign(stay_id=np.nan), "stay_id is NaN"),
    "no step": (lambda t: t.assign(step=np.nan), "step is NaN"),
    "mask": (lambda t: t.assign(ph_measured=np.nan), "ph_measured is NaN"),
    "half a mask": (lambda t: t.assign(ph_measured=0.5), "ph_measured holds 0.5"),
    "half ventilated": (lambda t: t.assign(ventilated=0.5), "ventilated holds 0.5"),
    "probability": (lambda t: t.assign(behavior_prob=1.5), "behavior_prob holds 1.5"),
    "no probability": (lambda t: t.assign(behavior_prob=0.0), "behavior_prob holds 0.0"),
    "two ages": (lambda t: t.assign(age=t["step"] + 60.0), "age changes within stay 30000000"),
    "two fates": (lambda t: t.assign(died_90d=t["step"] > 0), "died_90d changes within stay"),
    "two splits": (
        lambda t: t.assign(split=np.where(t["step"] > 0, "train", "test")),
        "split changes within stay 30000000",
    ),
    "Fahrenheit": (lambda t: t.assign(temp_c=98.6), "temp_c holds 98.6 in row 0; .*25 to 43 degC"),
    "less than no dose": (lambda t: t.assign(fluid_ml=-5.0), "fluid_ml holds -5.0 .*0 or more"),
    "SOFA 99": (lambda t: t.assign(sofa=99.0), "sofa holds 99.0 in row 0; expected 0 to 24"),
    "not born": (lambda t: t.assign(age=-5.0), "age holds -5.0 in row 0; expected 0 to 130 years"),
    "half a man": (lambda t: t.assign(male=0.5), "male holds 0.5"),
    "less than no urine": (lambda t: t.assign(urine_24h=-1.0), "urine_24h holds -1.0"),
    "level without a dose": (
        lambda t: t.assign(vasopressor_dose=0.0),
        "vasopressor_level holds [1-4] in row .*, where vasopressor_dose is 0; level 0 is no dose",
    ),
    "dose without a level": (lambda t: t.assign(fluid_level=0), "fluid_level holds 0 in row"),
    "doses upside down": (
        lambda t: t.assign(fluid_ml=np.where(t["fluid_level"] > 0, 900 - t["fluid_ml"], 0)),
        "fluid_level holds 2 in row .*, where fluid_ml is 700; .*higher levels are larger doses",
    ),
    "step 0.4": (lambda t: t.assign(step=t["step"] + 0.4), "step holds 0.4 .*a whole number"),
    "stay 7.5": (lambda t: t.assign(stay_id=7.5), "stay_id holds 7.5 in row 0; expected a whole"),
    "steps as text": (lambda t: t.assign(step=t["step"].astype(str)), "step is not numeric"),
    "a patient in two splits": (
        lambda t: t.assign(subject_id=7),
        "patient 7 has stays in more than one split",
    ),
    "two people": (lambda t: t.assign(subject_id=t["step"]), "subject_id changes within stay"),
}


def test_all_problems_of_a_table_are_named_at_once(table):
    assert table_problems(table) == []
    wrong = table.drop(columns=["ph"]).assign(temp_c=98.6, sofa="high", fluid_ml=-1.0, split="mine")
    found = table_problems(wrong, source="own.csv")
    named = ("missing: ph", "sofa is not", "split holds", "temp_c holds", "fluid_ml holds -1")
    assert len(found) == len(named)
    assert all(name in problem for name, problem in zip(named, found, strict=True))
    (gap,) = table_problems(table[table["step"] != 1])
    assert "are not 0, 1, 2" in gap
    wrong = table[table["step"] != 1].assign(ph=7e3, age=lambda t: 40 + t["step"], subject_id=1)
    found = table_problems(wrong)
    named = ("ph holds", "are not 0, 1, 2", "age changes within", "more than one split")
    assert len(found) == len(named)
    assert all(name in problem for name, problem in zip(named, found, strict=True))


def test_whole_numbers_may_be_written_as_floats(episodes, table):
    columns = {name: table[name].astype(float) for name in ("stay_id", "subject_id", "step")}
    assert_same(from_table(table.assign(**columns)), on_valid(episodes))


def test_long_numbers_keep_every_digit(episodes, tmp_path):
    stays = np.asarray(episodes.stay_id).astype(np.int64) + 2**33
    patients = np.where(np.arange(12) == 3, 2**32, 0) + np.asarray(episodes.subject_id)
    far = replace(episodes, stay_id=stays, subject_id=patients)
    loaded = load_episodes(save_episodes(far, tmp_path / "far"))
    assert loaded.stay_id.tolist() == stays.tolist()
    assert loaded.subject_id.tolist() == patients.tolist()
    assert loaded.select(jnp.array([2, 3])).stay_id.tolist() == stays[2:4].tolist()


def test_an_audit_may_read_a_patient_in_two_splits(episodes, tmp_path):
    path = save_episodes(replace(episodes, subject_id=0 * episodes.subject_id), tmp_path / "one")
    with pytest.raises(InputError, match="patient 0 has stays in more than one split"):
        load_episodes(path)
    assert load_episodes(path, shared_patients=True).num_stays == 12


def test_other_dose_levels_and_units_are_refused(folder):
    other = schema.DoseEdges(vasopressor=(0.08, 0.22, 0.45), fluid=(50.0, 180.0, 500.0))
    assert load_episodes(folder, dose_edges=schema.DEFAULT_DOSE_EDGES).num_stays == 12
    with pytest.raises(InputError, match=r"fluid levels have the edges 50, 180, 530, but .*500;"):
        load_episodes(folder, dose_edges=other)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["units"]["creatinine"] = "umol/L"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="creatinine is in umol/L, expected mg/dL"):
        load_episodes(folder)


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_refused(table, name):
    damage, message = BAD_TABLES[name]
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        from_table(damage(table), source="here")


def test_missing_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"none: no such folder; make one with `sepsis-jax"):
        load_episodes(tmp_path / "none")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: no such file"),
        (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json: not a manifest"),
        (lambda f: (f / "episodes.parquet").unlink(), r"episodes\.parquet: missing"),
        (
            lambda f: (f / "episodes.parquet").write_bytes(
                (f / "episodes.parquet").read_bytes()[:-100]
            ),
            r"episodes\.parquet: not a readable Parquet file",
        ),
        (lambda f: (f / "episodes.parquet").write_bytes(b""), "not a readable Parquet file"),
    ],
)
def test_damaged_folders_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_episodes(folder)


def test_another_schema_version_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 999}))
    for load in (load_episodes, load_scaler, load_dose_edges):
        with pytest.raises(InputError, match="schema version 999, this software reads 1"):
            load(folder)


def test_manifest_without_edges_is_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["dose_edges"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: dose_edges"):
        load_dose_edges(folder)


def test_damaged_scaler_is_named(folder):
    scaler = json.loads((folder / "scaler.json").read_text())
    (folder / "scaler.json").write_text(json.dumps({**scaler, "std": scaler["std"][:-1]}))
    with pytest.raises(InputError, match="std"):
        load_scaler(folder)


def test_saving_replaces_episodes_but_nothing_else(episodes, folder, tmp_path):
    save_episodes(episodes.select(np.arange(6)), folder)
    assert load_episodes(folder).num_stays == 6
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(InputError, match="other: exists"):
        save_episodes(episodes, other)
    with pytest.raises(InputError, match=r"thesis\.txt: exists and is a file"):
        save_episodes(episodes, other / "thesis.txt")
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_failing_save_leaves_the_old_folder(episodes, folder, tmp_path):
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="Out of range"):
        save_episodes(episodes, folder, manifest={"bad": float("nan")})
    assert (folder / "manifest.json").read_bytes() == before
    assert_same(load_episodes(folder), on_valid(episodes))
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]


def test_a_failing_first_save_leaves_nothing(episodes, tmp_path):
    no_train = episodes.select(np.asarray(episodes.split) > 0)
    with pytest.raises(InputError, match="train split holds no stays"):
        save_episodes(no_train, tmp_path / "cohort")
    assert list(tmp_path.iterdir()) == []
