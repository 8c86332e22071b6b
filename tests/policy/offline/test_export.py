"""Exports: the same transitions, read back through NumPy and through Minari."""

import builtins
import json

import jax
import minari
import numpy as np
import pytest

from policy.offline.data import transitions, write_d3rlpy, write_minari
from tests.toy import toy_episodes
from worldmodel.errors import InputError

PAST = 3
EPISODES = toy_episodes(12, 7)
LENGTH = np.asarray(EPISODES.length)


def outcome(stay):
    return -15.0 if EPISODES.died_90d[stay] else 15.0


def test_d3rlpy_arrays_are_the_transitions(tmp_path, unit_scaler):
    path = tmp_path / "rows.npz"
    write_d3rlpy(path, EPISODES, unit_scaler, PAST)
    want = transitions(EPISODES, unit_scaler, past=PAST)
    with np.load(path) as file:
        assert file["actions"].dtype.kind == "i"
        np.testing.assert_array_equal(file["observations"], want.features)
        np.testing.assert_array_equal(file["actions"], want.action)
        np.testing.assert_array_equal(file["rewards"], want.reward)
        ends = np.cumsum(LENGTH) - 1
        np.testing.assert_array_equal(np.flatnonzero(file["terminals"]), ends)
        assert not file["timeouts"].any()
        np.testing.assert_array_equal(
            file["rewards"][ends], [outcome(stay) for stay in range(len(LENGTH))]
        )
        np.testing.assert_array_equal(file["stay_id"][ends], EPISODES.stay_id)
        assert len(file["actions"]) == len(file["stay_id"]) == LENGTH.sum()
    assert [file.name for file in tmp_path.iterdir()] == ["rows.npz"]


def test_minari_reads_every_stay(tmp_path, unit_scaler):
    write_minari(tmp_path / "data", EPISODES, unit_scaler, PAST)
    data = minari.MinariDataset(tmp_path / "data")
    rows = transitions(EPISODES, unit_scaler, past=PAST)
    assert (data.total_episodes, data.total_steps) == (12, LENGTH.sum())
    assert data.action_space.n == 25
    first = 0
    for stay, episode in enumerate(data.iterate_episodes()):
        here = slice(first, first + LENGTH[stay])
        first = here.stop
        assert len(episode) == LENGTH[stay]
        np.testing.assert_array_equal(episode.observations[:-1], rows.features[here])
        np.testing.assert_array_equal(episode.observations[-1], rows.features[here.stop - 1])
        np.testing.assert_array_equal(episode.actions, rows.action[here])
        np.testing.assert_array_equal(episode.rewards, rows.reward[here])
        assert episode.rewards[-1] == outcome(stay)
        assert episode.terminations.tolist() == [False] * (LENGTH[stay] - 1) + [True]
        assert not episode.truncations.any()
        assert (episode.infos["stay_id"] == int(EPISODES.stay_id[stay])).all()
        assert len(episode.infos["stay_id"]) == LENGTH[stay] + 1
        assert all(data.observation_space.contains(row) for row in episode.observations)
        assert all(data.action_space.contains(action) for action in episode.actions)
    assert first == rows.num_rows


@pytest.mark.parametrize("past", [0, 1])
def test_minari_finds_it_by_name(past, tmp_path, monkeypatch, unit_scaler):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = "sepsis/toy-v3"
    write_minari(tmp_path / name / "data", EPISODES, unit_scaler, past, dataset_id=name)
    found = minari.load_dataset(name)
    assert found.spec.dataset_id == name
    assert found[4].observations.shape == (LENGTH[4] + 1, *found.observation_space.shape)


def test_an_older_export_is_replaced_and_nothing_else(tmp_path, unit_scaler):
    write_minari(tmp_path / "data", EPISODES, unit_scaler, PAST)
    write_minari(tmp_path / "data", EPISODES.select(slice(0, 3)), unit_scaler, PAST)
    assert json.loads((tmp_path / "data" / "metadata.json").read_text())["total_episodes"] == 3
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="choose another name"):
        write_minari(other, EPISODES, unit_scaler, PAST)


def test_no_stays(tmp_path, unit_scaler):
    none = jax.tree.map(lambda leaf: leaf[:0], EPISODES)
    for write in (write_d3rlpy, write_minari):
        with pytest.raises(InputError, match="no stays"):
            write(tmp_path / "x.npz", none, unit_scaler, PAST)


def test_without_h5py(tmp_path, monkeypatch, unit_scaler):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"sepsis-jax\[export\]"):
        write_minari(tmp_path / "data", EPISODES, unit_scaler, PAST)
