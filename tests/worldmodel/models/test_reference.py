"""The published checkpoint folder: parity with torch, both ways, and bad files."""

import pickle
import shutil
import zipfile

import jax
import numpy as np
import pytest

from worldmodel.errors import InputError
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.reference import (
    OUTCOME_FILE,
    STATE_FILE,
    load_reference,
    read_state_dict,
    save_reference,
    write_state_dict,
)
from worldmodel.models.world_model import init_world_model


@pytest.fixture
def folder(tmp_path, unit_scaler):
    model = init_world_model(jax.random.key(0), unit_scaler, ModelConfig(variant="reference"))
    return save_reference(model, tmp_path / "published")


def inputs(window, batch=7, seed=0):
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(batch, window, 39)).astype(np.float32)
    mask = (rng.random((batch, window, 38)) < 0.5).astype(np.float32)
    action = np.zeros((batch, window, 10), np.float32)
    obs[0, :3], mask[0, :3] = 0, 0  # left padding
    return obs, mask, rng.normal(size=(batch, 3)).astype(np.float32), action


@pytest.mark.parity
def test_torch_and_flax_agree_on_a_torch_made_folder(folder):
    torch = pytest.importorskip("torch")
    from tests.worldmodel.models.torch_twin import OutcomeTwin, StateTwin

    torch.manual_seed(3)
    state, outcome = StateTwin().eval(), OutcomeTwin().eval()
    torch.save(state.state_dict(), folder / STATE_FILE)
    torch.save(outcome.state_dict(), folder / OUTCOME_FILE)
    model = load_reference(folder)
    with torch.no_grad():
        expected = state(*map(torch.from_numpy, inputs(6)))
        expected_outcome = outcome(*map(torch.from_numpy, inputs(12)))
    for got, want in zip(model.transition(*inputs(6)), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5, rtol=0)
    got = model.mortality_logit(*inputs(12))
    np.testing.assert_allclose(got, expected_outcome.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parity
def test_torch_reads_what_we_write(folder):
    torch = pytest.importorskip("torch")
    from tests.worldmodel.models.torch_twin import StateTwin

    twin = StateTwin().eval()
    twin.load_state_dict(torch.load(folder / STATE_FILE, weights_only=True))
    with torch.no_grad():
        want = twin(*map(torch.from_numpy, inputs(6)))
    got = load_reference(folder).transition(*inputs(6))
    np.testing.assert_allclose(got[0], want[0].numpy(), atol=1e-5, rtol=0)


def test_round_trip_is_exact(folder, tmp_path):
    model = load_reference(folder)
    again = load_reference(save_reference(model, tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, model, again)


def test_pickled_code_is_refused(folder):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    with zipfile.ZipFile(folder / STATE_FILE, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    with pytest.raises(InputError, match="not allowed"):
        load_reference(folder)


def test_tensor_outside_its_storage_is_refused(tmp_path):
    write_state_dict({"w": np.ones((4, 4))}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w") as out,
    ):
        for name in source.namelist():
            raw = source.read(name)
            out.writestr(name, raw[:16] if name.endswith("data/0") else raw)
    with pytest.raises(InputError, match="state dict"):
        read_state_dict(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / OUTCOME_FILE).unlink(), "no such file"),
        (lambda f: (f / STATE_FILE).write_bytes(b"junk"), "zip archive"),
        (lambda f: shutil.copy(f / OUTCOME_FILE, f / STATE_FILE), "missing"),
        (lambda f: shutil.copy(f / STATE_FILE, f / OUTCOME_FILE), "missing"),
        (lambda f: (f / "scaler_params_log.json").write_text("{"), "JSON"),
    ],
)
def test_bad_folders_say_what_is_wrong(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_reference(folder)


def test_wrong_shape_names_the_tensor(folder):
    tensors = read_state_dict(folder / STATE_FILE)
    tensors["mu_head.bias"] = np.zeros(40)
    write_state_dict(tensors, folder / STATE_FILE)
    with pytest.raises(InputError, match=r"mu_head\.bias has shape \(40,\)"):
        load_reference(folder)
