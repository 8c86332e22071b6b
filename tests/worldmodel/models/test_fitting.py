"""The training loop: progress, early stopping, exact resume, errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toy import toy_episodes
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import Saver
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.fitting import FitConfig, fit, mean_loss
from worldmodel.models.training import TrainConfig, train_world_model
from worldmodel.models.windows import to_sequences, transition_index
from worldmodel.scaling import Scaler

# A problem that needs no network: one number per member is pulled to 3.


@pytest.fixture(scope="module")
def sequences():
    episodes = toy_episodes(16, 5)
    index = transition_index(episodes)[:40]  # ten steps of four rows an epoch
    return to_sequences(episodes, Scaler.fit(episodes)), index


def pull(model, sequences, index, key):
    """Squared distance from 3, the same for every row."""
    return jnp.square(model["w"] - 3.0).mean() + 0.0 * index.sum()


def run(sequences, loss, *, start=(0.0, 1.0), epochs=5, saver=None, progress=None, **settings):
    config = FitConfig(epochs=epochs, batch_size=4, learning_rate=0.1, **settings)
    model = {"w": jnp.asarray(start, jnp.float32)}
    return fit(
        jax.random.key(0), model, loss, sequences, sequences, config,
        saver=saver, progress=progress,
    )  # fmt: skip


def test_the_loss_falls_and_is_recorded(sequences):
    best, history = run(sequences, pull)
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5]
    losses = [record["validation_loss"] for record in history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    distance = np.square(np.asarray(best["w"]) - 3).mean()
    assert history[-1]["best_validation_loss"] == pytest.approx(distance, rel=1e-5)


def test_each_member_keeps_its_best(sequences):
    """Evaluation prefers w = 1; training pulls to 3, so the best epoch is passed on the way."""

    def loss(model, sequences, index, key):
        return jnp.square(model["w"] - (1.0 if key is None else 3.0)).mean() + 0.0 * index.sum()

    seen = []
    best, history = run(
        sequences, loss, start=(0.0, 2.0), epochs=8, patience=2,
        progress=lambda epoch, epochs, record: seen.append((epoch, epochs)),
    )  # fmt: skip
    w = np.asarray(best["w"])
    assert abs(w[0] - 1.0) < 0.5  # caught on the way up from 0
    # The second only gets worse: its first epoch is its best, just past 2.
    assert 2.0 < w[1] < 2.8
    assert seen == [(k + 1, 8) for k in range(len(history))]


def test_a_stopped_member_never_starts_again(sequences):
    """Member 1 gets worse for two epochs and stops; a later improvement must not restart it."""

    def loss(model, sequences, index, key):
        w = model["w"].mean()
        if key is not None:
            return -w + 0.0 * index.sum()  # a steady climb: +0.7 in the first epoch, then +1
        # Member 0 starts at -100 and always improves. Member 1 starts at 10: its losses are
        # about 10.7, 11.6, 12.5, and the epoch after that would be its best by far.
        return jnp.where((w < 0) | (w > 12.8), -w, w) + 0.0 * index.sum()

    best, history = run(sequences, loss, start=(-100.0, 10.0), epochs=8, patience=2)
    w = np.asarray(best["w"])
    assert len(history) == 8 and w[0] > -97  # member 0 goes on
    assert w[1] == pytest.approx(10.7, abs=0.1)  # member 1 keeps its first epoch


def test_all_stopped_ends_the_run(sequences):
    def worse(model, sequences, index, key):
        loss = jnp.square(model["w"] - 3.0).mean()
        return (loss if key is not None else -loss) + 0.0 * index.sum()

    _, history = run(sequences, worse, epochs=50, patience=3)
    assert len(history) == 4  # the first is the best, then three without a better one


@pytest.mark.parametrize("where", ["training", "validation"])
def test_nan_stops_the_run(sequences, where):
    def broken(model, sequences, index, key):
        bad = (key is None) == (where == "validation")
        return model["w"].mean() * (jnp.nan if bad else 1.0) + 0.0 * index.sum()

    with pytest.raises(InputError, match=f"{where} loss is not finite in epoch 1"):
        run(sequences, broken)


def test_no_windows_is_an_error(sequences):
    empty = (sequences[0], np.zeros((0, 2), np.int32))
    for train, validation, name in ((empty, sequences, "training"), (sequences, empty, "valid")):
        with pytest.raises(InputError, match=f"the {name}.* split has no windows"):
            fit(jax.random.key(0), {"w": jnp.zeros(1)}, pull, train, validation, FitConfig())


def test_mean_loss_weighs_rows_alike(sequences):
    data, index = sequences

    def row(model, sequences, index, key):
        return (index[:, 0] * 10.0 + index[:, 1]).mean()

    want = (index[:, 0] * 10.0 + index[:, 1]).mean()
    for batch in (7, len(index), 1000):
        assert mean_loss(None, row, data, jnp.asarray(index), batch=batch) == pytest.approx(want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"patience": 0}, "patience: got 0"),
        ({"learning_rate": 0.0}, r"learning_rate: got 0\.0"),
        ({"clip_norm": -1.0}, r"clip_norm: got -1\.0"),
        ({"weight_decay": -1.0}, r"weight_decay: got -1\.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        FitConfig(**settings)


# The real models


CONFIG = TrainConfig(
    model=ModelConfig(variant="residual", hidden=4, layers=1, embed=4, head=4),
    state=FitConfig(epochs=3, batch_size=32, learning_rate=5e-3),
    outcome=FitConfig(epochs=2, batch_size=32),
    members=2,
)


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def toy():
    episodes = toy_episodes(60, 7)
    return episodes, Scaler.fit(episodes)


@pytest.fixture(scope="module")
def trained(toy):
    return train_world_model(*toy, CONFIG)


def test_training_lowers_the_loss_of_both_models(trained):
    state, outcome = trained.history["state"], trained.history["outcome"]
    assert state[-1]["train_loss"] < state[0]["train_loss"]
    assert state[-1]["best_validation_loss"] < state[0]["validation_loss"]
    assert (len(state), len(outcome)) == (3, 2)


def test_members_are_trained_apart(trained):
    leaves = jax.tree.leaves(trained.world_model.state_model)
    assert any(not np.allclose(leaf[0], leaf[1]) for leaf in leaves)


def test_metrics_stand_beside_the_baselines(trained, toy):
    metrics = trained.metrics
    assert (metrics["split"], metrics["stays"]) == ("test", toy[0].of_split("test").num_stays)
    assert set(metrics["state"]) == {"model", "last_value", "linear"}
    assert all(np.isfinite(row["nll"]) for row in metrics["state"].values())


@pytest.mark.parametrize(
    "stop",
    [
        ("state", 2),
        pytest.param(("state", 3), marks=pytest.mark.slow),
        pytest.param(("outcome", 1), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(toy, trained, tmp_path, stop):
    def kill(name, epoch, epochs, record):
        if (name, epoch) == stop:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_world_model(*toy, CONFIG, state_folder=tmp_path / "run", progress=kill)
    seen = []
    resumed = train_world_model(
        *toy, CONFIG, state_folder=tmp_path / "run",
        progress=lambda name, epoch, epochs, record: seen.append((name, epoch)),
    )  # fmt: skip
    done = [("state", 1), ("state", 2), ("state", 3), ("outcome", 1), ("outcome", 2)]
    assert seen == done[done.index(stop) + 1 :]
    assert resumed.history == trained.history
    assert resumed.metrics == trained.metrics
    jax.tree.map(np.testing.assert_array_equal, resumed.world_model, trained.world_model)


def test_the_state_of_another_run_is_refused(toy, tmp_path):
    def kill(*_):
        raise StoppedError

    with pytest.raises(StoppedError):
        train_world_model(*toy, CONFIG, state_folder=tmp_path / "run", progress=kill)
    episodes, scaler = toy
    others = (
        (episodes, scaler, replace(CONFIG, seed=1)),
        (replace(episodes, died_90d=~episodes.died_90d), scaler, CONFIG),
        (episodes, replace(scaler, mean=scaler.mean + 1), CONFIG),
    )
    for other in others:
        with pytest.raises(InputError, match="a run with other settings or data"):
            train_world_model(*other, state_folder=tmp_path / "run")


def test_a_refused_run_leaves_no_state(toy, tmp_path):
    episodes, scaler = toy
    no_validation = episodes.select(np.asarray(episodes.split) != 1)
    with pytest.raises(InputError, match="validation split has no stay of two steps"):
        train_world_model(no_validation, scaler, CONFIG, state_folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_test_split_is_found_before_training(toy):
    episodes, scaler = toy

    def never(*_):
        pytest.fail("trained before looking at the test split")

    with pytest.raises(InputError, match="test split"):
        train_world_model(
            episodes.select(np.asarray(episodes.split) != 2), scaler, CONFIG, progress=never
        )


def test_a_damaged_state_is_one_clear_error(toy, tmp_path):
    def kill(*_):
        raise StoppedError

    with pytest.raises(StoppedError):
        train_world_model(*toy, CONFIG, state_folder=tmp_path / "run", progress=kill)
    arrays = tmp_path / "run" / "state" / "state" / "arrays"
    for file in arrays.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match="arrays: not a readable checkpoint"):
        train_world_model(*toy, CONFIG, state_folder=tmp_path / "run")


def test_saver_gives_back_keys_and_history(tmp_path):
    saver = Saver(tmp_path / "run", {"a": 1})
    state = {"x": jnp.arange(3.0), "key": jax.random.split(jax.random.key(4), 2)}
    assert saver.restore(state) == (state, [])
    saver.save(1, state, [{"loss": 0.5}])
    blank = {"x": jnp.zeros(3), "key": jax.random.split(jax.random.key(0), 2)}
    restored, history = Saver(tmp_path / "run", {"a": 1}).restore(blank)
    np.testing.assert_array_equal(restored["x"], state["x"])
    np.testing.assert_array_equal(
        jax.random.key_data(restored["key"]), jax.random.key_data(state["key"])
    )
    assert history == [{"loss": 0.5}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": 0}, "members: got 0"),
        ({"imputed_weight": -0.5}, r"imputed_weight: got -0\.5"),
        ({"vent_weight": -1.0}, r"vent_weight: got -1\.0"),
    ],
)
def test_bad_training_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings)


def test_the_variant_sets_its_defaults():
    residual, reference = (
        TrainConfig(model=ModelConfig(variant=name)) for name in ("residual", "reference")
    )
    assert residual.resolved_prefixes and 0 < residual.resolved_imputed_weight < 1
    assert (reference.resolved_imputed_weight, reference.resolved_prefixes) == (1.0, False)
    assert replace(reference, imputed_weight=0.0).resolved_imputed_weight == 0.0
