"""Cards and Croissant metadata: complete, deterministic, and read by Croissant's own package."""

import json
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.cards import data_card, policy_card, terms_of, world_model_card
from worldmodel.episode_files import COLUMNS, load_episodes, load_manifest, save_episodes
from worldmodel.files import digest_file

FIGURES = {"mae": 0.25, "nll": None}
MODEL = {
    "config": {"variant": "residual", "hidden": 64},
    "members": 3,
    "step_hours": 4.0,
    "training": {"seed": 7},
    "metrics": {
        "split": "test",
        "stays": 12,
        "state": {"model": FIGURES, "linear": {"mae": 0.5}},
        "outcome": {"model": {"auroc": 0.8125}},
    },
    "episodes": {"source": "synthetic", "stays": 60, "sha256": "ab" * 32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohorts")
    return save_episodes(toy_episodes(12, 6), root / "one", manifest={"source": "synthetic"})


def front_matter(card):
    _, head, body = card.split("---\n", 2)
    assert "Not for clinical use" in body and "## Terms" in body
    return yaml.safe_load(head), body


def test_cards_say_what_the_artefact_is(folder):
    front, body = front_matter((folder / "README.md").read_text())
    assert front["license"] == "cc0-1.0" and "12 stays" in body and "simulated" in body
    front, body = front_matter(world_model_card(MODEL))
    assert front["library_name"] == "sepsis-jax"
    for fact in ("residual", "3 members", "Seed 7", "60 stays", "ab" * 32, "12 stays", "0.8125"):
        assert fact in body
    assert "| model | 0.25 |  |" in body and "| linear | 0.5 |  |" in body
    policy = {
        "method": "iql",
        "source": "synthetic",
        "config": {"seed": 5},
        "last": {"seed 0": 6.5},
        "inputs": {"episodes": "cd" * 32},
    }
    front, body = front_matter(policy_card(policy))
    assert "Seed 5" in body and "| seed 0 | 6.5 |" in body and "cd" * 32 in body


@pytest.mark.parametrize("source", ["mimic-iv", "meds", "own table", None])
def test_records_of_people_are_not_called_free(source):
    terms = terms_of(source)
    assert terms.tag == "other" and "share" in terms.note
    assert (terms.license is None) == (source != "mimic-iv")
    facts = {"stays": 2, "rows": 9, "step_hours": 4.0, "source": source}
    assert "cc0" not in data_card(facts) and terms.note in data_card(facts)
    assert terms.note in world_model_card(MODEL | {"episodes": {"source": source}})


def test_croissant_names_every_file_and_field(folder):
    found = json.loads((folder / "croissant.json").read_text())
    files = {one["contentUrl"]: one["sha256"] for one in found["distribution"]}
    assert sorted(files) == ["episodes.parquet", "manifest.json", "scaler.json"]
    for name, sha256 in files.items():
        assert digest_file(folder / name) == sha256
    (records,) = found["recordSet"]
    fields = {one["name"]: one for one in records["field"]}
    assert tuple(fields) == COLUMNS
    assert fields["meanbp"]["description"] == "meanbp in mmHg"
    kinds = {np.dtype(bool): "sc:Boolean", np.dtype(np.float32): "sc:Float"}
    for name, dtype in pd.read_parquet(folder / "episodes.parquet").dtypes.items():
        if dtype in kinds:
            assert fields[name]["dataType"] == kinds[dtype]
    assert {"@context", "@type", "conformsTo", "name", "description", "license"} <= set(found)


def test_equal_cohorts_have_equal_metadata(folder):
    again = save_episodes(
        load_episodes(folder), folder.with_name("again"), manifest={"source": "synthetic"}
    )
    for name in ("croissant.json", "README.md"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert load_manifest(folder)["schema_version"] == schema.SCHEMA_VERSION


@pytest.mark.skipif(find_spec("mlcroissant") is None, reason="needs the extra `croissant`")
@pytest.mark.parity
def test_mlcroissant_reads_the_records(folder):
    import mlcroissant

    data_set = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    records = list(data_set.records("steps"))
    table = pd.read_parquet(folder / "episodes.parquet")
    assert len(records) == len(table)
    for name in ("stay_id", "meanbp", "vasopressor_level", "died_90d", "lactate_measured"):
        np.testing.assert_allclose([row[f"steps/{name}"] for row in records], table[name])
