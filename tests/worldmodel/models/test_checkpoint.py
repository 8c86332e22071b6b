"""World models on disk: exact round trips, and one clear error for everything else."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.toy import toy_episodes
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import (
    load_pretrained,
    load_world_model,
    save_pretrained,
    save_world_model,
)
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.evaluation import predict
from worldmodel.models.reference import load_reference, save_reference
from worldmodel.models.training import calibrate_sigma
from worldmodel.models.windows import to_sequences, transition_index
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import Scaler

CONFIG = ModelConfig(variant="residual", hidden=4, layers=1, embed=4, head=4)


@pytest.fixture(scope="module")
def world():
    scaler = Scaler(jnp.arange(39.0), jnp.full(39, 2.0), jnp.array([60.0, 0, 5]), jnp.ones(3))
    edges = schema.DoseEdges(vasopressor=(0.1, 0.2, 0.3), fluid=(1.0, 2.0, 3.0))
    return init_world_model(
        jax.random.key(1), scaler, CONFIG, members=2, step_hours=2.0, dose_edges=edges
    )


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    return save_world_model(world, tmp_path_factory.mktemp("a") / "model", manifest={"note": "x"})


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def change_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= changes
    manifest = {name: value for name, value in manifest.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_everything_comes_back(world, saved):
    loaded = load_world_model(saved)
    assert jax.tree.structure(loaded) == jax.tree.structure(world)
    jax.tree.map(np.testing.assert_array_equal, loaded, world)
    assert (loaded.config, loaded.step_hours, loaded.dose_edges, loaded.num_members) == (
        CONFIG, 2.0, world.dose_edges, 2,
    )  # fmt: skip
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["note"] == "x"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder; train one with"),
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: no such file"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "not a world model"),
        (lambda f: change_manifest(f, kind="cake"), "not a world model .*'cake'"),
        (lambda f: change_manifest(f, schema_version=99), "schema version 99"),
        (lambda f: change_manifest(f, config=None), "manifest.*'config'"),
        (lambda f: change_manifest(f, config={"depth": 3}), "manifest.*depth"),
        (lambda f: change_manifest(f, members="many"), "manifest.*many"),
        (lambda f: change_manifest(f, members=3), r"has shape \(2, .*expected \(3, "),
        (lambda f: change_manifest(f, dose_edges={"fluid_ml": [1]}), "dose_edges missing"),
        (lambda f: change_manifest(f, config={"hidden": 6}), "another model configuration"),
        (lambda f: (f / "scaler.json").unlink(), r"scaler\.json: no such file"),
        (lambda f: shutil.rmtree(f / "params"), "params: missing; the checkpoint is incomplete"),
        (lambda f: empty_files(f / "params"), "params: not a readable checkpoint"),
        (lambda f: remove_files(f / "params"), "params: not a readable checkpoint"),
    ],
)
def test_damaged_folders_are_one_clear_error(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_world_model(folder)


def empty_files(folder):
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        file.write_bytes(b"")


def remove_files(folder):
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        file.unlink()


def test_saving_replaces_models_only(world, folder, tmp_path):
    save_world_model(world.member(0), folder)
    assert load_world_model(folder).num_members == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text("{}")  # of something else
    with pytest.raises(InputError, match="other: exists"):
        save_world_model(world, other)
    assert [path.name for path in other.iterdir()] == ["manifest.json"]


@pytest.fixture(scope="module")
def pretrained(world, tmp_path_factory):
    return save_pretrained(world, tmp_path_factory.mktemp("hub") / "model")


def test_a_hugging_face_folder_comes_back_bit_by_bit(world, pretrained):
    names = sorted(path.name for path in pretrained.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    for load in (load_pretrained, load_world_model):
        loaded = load(pretrained)
        assert jax.tree.structure(loaded) == jax.tree.structure(world)
        for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(world), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    config = json.loads((pretrained / "config.json").read_text())
    assert config["model_type"] == "sepsis_jax_world_model" and config["members"] == 2
    # The same file every time, as other readers of the format see it.
    tensors = load_file(pretrained / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    again = save_pretrained(world, pretrained.with_name("again"))
    for name in names:
        assert (again / name).read_bytes() == (pretrained / name).read_bytes()


def test_variants_and_members_come_back(world, tmp_path):
    for variant in ("reference", "recurrent"):
        config = ModelConfig(variant=variant, hidden=4, layers=1, embed=4, head=4)
        model = init_world_model(jax.random.key(2), world.scaler, config, stay_steps=7)
        loaded = load_world_model(save_pretrained(model, tmp_path / variant))
        jax.tree.map(np.testing.assert_array_equal, loaded, model)
        assert (loaded.config, loaded.stay_steps) == (config, model.stay_steps)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def first(tensors):
    return sorted(tensors)[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
        (lambda f: change_config(f, kind="cake"), "not a world model .*'cake'"),
        (lambda f: change_config(f, scaler=3), "no scaler"),
        (lambda f: change_config(f, members=3), r"of shape \(2, .* of \(3, "),
        (lambda f: change_tensors(f, lambda t: t.pop(first(t))), "is missing or unknown"),
        (lambda f: change_tensors(f, lambda t: t.update(x=np.ones(1))), "x is missing or unknown"),
        (
            lambda f: change_tensors(
                f, lambda t: t.update({first(t): t[first(t)].astype(np.float64)})
            ),
            "is float64 of shape",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04"), "not readable"),
    ],
)
def test_damaged_hugging_face_folders_are_one_clear_error(pretrained, tmp_path, damage, message):
    folder = shutil.copytree(pretrained, tmp_path / "model")
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_world_model(folder)


def test_only_the_published_shape_can_be_exported(world, tmp_path):
    with pytest.raises(InputError, match=r"--set model\.variant=reference"):
        save_reference(world, tmp_path / "published")
    unit = world.scaler
    published = ModelConfig(variant="reference")
    with pytest.raises(InputError, match="holds one model"):
        save_reference(
            init_world_model(jax.random.key(0), unit, published, members=2), tmp_path / "published"
        )
    with pytest.raises(InputError, match="4-hour steps"):
        save_reference(
            init_world_model(jax.random.key(0), unit, published, step_hours=2.0),
            tmp_path / "published",
        )
    assert list(tmp_path.iterdir()) == []


def test_dropout_and_precision_do_not_hinder_export(world, tmp_path):
    config = ModelConfig(variant="reference", dropout=0.1, precision="default", linear_rows=1)
    model = init_world_model(jax.random.key(0), world.scaler, config)
    loaded = load_reference(save_reference(model, tmp_path / "published"))
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(loaded.state_model),
        jax.tree.leaves(model.state_model),
    )


# Calibration


@pytest.fixture(scope="module")
def wandering():
    """Stays whose every value is drawn anew: z ~ N(0, spread_j), nothing to predict."""
    toy = toy_episodes(150, 9)
    rng = np.random.default_rng(0)
    scaler = Scaler(jnp.zeros(39), jnp.ones(39), jnp.zeros(3), jnp.ones(3))
    values = rng.normal(size=toy.dynamic.shape) * np.linspace(0.2, 1.9, 39)
    values[..., schema.URINE] = np.expm1(np.abs(values[..., schema.URINE]))
    dynamic = np.where(np.asarray(toy.valid)[..., None], values, 0.0)
    return replace(toy, dynamic=jnp.asarray(dynamic, jnp.float32)), scaler


def test_calibrated_intervals_cover_nine_in_ten(wandering):
    episodes, scaler = wandering
    model = init_world_model(jax.random.key(0), scaler, CONFIG, members=2)
    fitted, fresh = (to_sequences(episodes.select(np.arange(a, a + 75)), scaler) for a in (0, 75))
    index = [transition_index(episodes.select(np.arange(a, a + 75))) for a in (0, 75)]
    calibrated = calibrate_sigma(model, fitted, index[0])

    def coverage(world_model):
        prediction = predict(world_model, fresh, index[1])
        target = fresh.target(index[1])
        inside = np.abs(np.asarray(target.obs) - prediction.mu) <= 1.6448536 * prediction.sigma
        measured = np.asarray(target.measured)
        return (inside & measured).sum(0)[:38] / measured.sum(0)[:38]

    before, after = coverage(model), coverage(calibrated)
    # The last value stays, so errors are N(0, sqrt(2) spread): one sigma fits only a few features.
    assert np.abs(before - 0.9).max() > 0.3
    assert np.abs(after - 0.9).max() < 0.07
    assert abs(after.mean() - 0.9) < 0.01
    # Each member for itself, mu as it was, and the model that was given untouched.
    np.testing.assert_array_equal(np.asarray(model.state_model.log_sigma_offset[...]), 0.0)
    unchanged = predict(calibrated, fresh, index[1]).mu
    np.testing.assert_array_equal(unchanged, predict(model, fresh, index[1]).mu)


def test_rare_features_keep_their_sigma(wandering):
    episodes, scaler = wandering
    measured = np.asarray(episodes.measured).copy()
    measured[..., 5] = False
    sequences = to_sequences(replace(episodes, measured=jnp.asarray(measured)), scaler)
    model = init_world_model(jax.random.key(0), scaler, CONFIG)
    calibrated = calibrate_sigma(model, sequences, transition_index(episodes))
    offset = np.asarray(calibrated.state_model.log_sigma_offset[...])[0]
    assert offset[5] == 0.0 and (offset[[4, 6]] != 0.0).all()
