"""Recorded stays as transitions, and as data sets of other offline RL libraries."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from policy.base import decision_features
from worldmodel import schema, struct
from worldmodel.clinical.reward import episode_rewards
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import atomic_file, atomic_folder, write_json
from worldmodel.observation import observation_at, state_feature_bounds
from worldmodel.resources import in_blocks
from worldmodel.scaling import Scaler


@struct.dataclass
class Transitions:
    """M recorded steps in order, stay after stay: row m + 1 follows row m unless it is the last.

    A stay's last row has no next state: its reward is the terminal one.
    """

    features: jax.Array  # [M, D]
    action: jax.Array  # [M] int32
    reward: jax.Array  # [M]
    last: jax.Array  # [M] bool, the stay ends with this row
    sofa: jax.Array  # [M]

    @property
    def num_rows(self) -> int:
        """Number of transitions M."""
        return self.action.shape[0]


def transitions(episodes: Episodes, scaler: Scaler, *, past: int, block: int = 4096) -> Transitions:
    """Transitions of all stays.

    Args:
      episodes: the stays.
      scaler: of measurements and static features.
      past: rows that the features look back on.
      block: rows per call; bounds the memory.
    """
    stay, step = np.nonzero(np.asarray(episodes.valid))
    features = in_blocks(
        lambda rows: _features(episodes, scaler, stay[rows], step[rows], past=past),
        len(stay),
        block,
    )
    return Transitions(
        features=jnp.asarray(features),
        action=episodes.action[stay, step],
        reward=episode_rewards(episodes)[stay, step],
        last=jnp.asarray(step == np.asarray(episodes.length)[stay] - 1),
        sofa=episodes.sofa[stay, step],
    )


@partial(jax.jit, static_argnames="past")
def _features(
    episodes: Episodes, scaler: Scaler, stays: jax.Array, steps: jax.Array, *, past: int
) -> jax.Array:
    return decision_features(observation_at(episodes, stays, steps, past=past), scaler)


_MINARI_VERSION = "0.5.0"  # the layout's; every 0.5 reads it
MINARI_DATA = "main_data.hdf5"
_LARGEST_CHANGE = 5.0  # of `decision_features`


def check_d3rlpy_file(path: Path) -> None:
    """Makes sure of a name that `write_d3rlpy` can write.

    Raises:
      InputError: the name does not end with .npz, or is that of a folder.
    """
    if path.suffix != ".npz":
        raise InputError(
            f"{path}: the arrays for d3rlpy are a NumPy file; choose a name that ends with .npz"
        )
    if path.is_dir():
        raise InputError(f"{path}: is a folder; choose the name of a file")


def write_d3rlpy(path: str | Path, episodes: Episodes, scaler: Scaler, past: int) -> None:
    """Writes the arrays that `d3rlpy.dataset.MDPDataset` takes to a .npz file.

    They are `observations` [M, D], `actions` [M] int32, `rewards`, `terminals` and `timeouts` [M]
    float32, for M recorded rows, stay after stay; beside them `stay_id` [M], as in the
    episodes. A file of that name is replaced.

    Args:
      path: file to write.
      episodes: the stays.
      scaler: of measurements and static features.
      past: rows that the observations look back on.

    Raises:
      InputError: there are no stays.
    """
    check_d3rlpy_file(Path(path))
    rows = _rows(episodes, scaler, past)
    last = np.asarray(rows.last)
    arrays = {
        "observations": np.asarray(rows.features, np.float32),
        "actions": np.asarray(rows.action, np.int32),
        "rewards": np.asarray(rows.reward, np.float32),
        "terminals": last.astype(np.float32),
        "timeouts": np.zeros(len(last), np.float32),
        "stay_id": np.repeat(np.asarray(episodes.stay_id), np.asarray(episodes.length)),
    }
    with atomic_file(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def write_minari(
    path: str | Path,
    episodes: Episodes,
    scaler: Scaler,
    past: int,
    *,
    dataset_id: str = "sepsis/episodes-v0",
) -> None:
    """Writes the folder that `minari.MinariDataset(path)` of Minari 0.5 reads.

    Written to `<datasets>/<dataset_id>/data`, `minari.load_dataset(dataset_id)` finds it. Minari
    wants one observation more than there are steps; nothing was recorded after the last row, so
    it stands there twice. `infos` holds the `stay_id`.

    Args:
      path: folder to write; an older one of its kind is replaced.
      episodes: the stays.
      scaler: of measurements and static features.
      past: rows that the observations look back on.
      dataset_id: name of the data set.

    Raises:
      InputError: there are no stays, h5py is not installed, or something else is at `path`.
    """
    try:
        import h5py
    except ImportError:
        raise InputError(
            "Minari data sets need h5py; install it with `pip install sepsis-jax[export]`"
        ) from None
    rows = _rows(episodes, scaler, past)
    observations, action = np.asarray(rows.features, np.float32), np.asarray(rows.action, np.int64)
    reward, last = np.asarray(rows.reward, np.float32), np.asarray(rows.last)
    lengths, stay_ids = np.asarray(episodes.length), np.asarray(episodes.stay_id)
    with atomic_folder(Path(path), marker=MINARI_DATA) as folder:
        with h5py.File(folder / MINARI_DATA, "w", track_order=True) as file:
            first = 0
            for number, (length, stay_id) in enumerate(zip(lengths, stay_ids, strict=True)):
                here = slice(first, first + int(length))
                first = here.stop
                group = file.create_group(f"episode_{number}")
                group.attrs.update({"id": number, "total_steps": int(length)})
                seen = observations[here]
                group["observations"] = np.concatenate([seen, seen[-1:]])
                group["actions"] = action[here]
                group["rewards"] = reward[here]
                group["terminations"] = last[here]
                group["truncations"] = np.zeros(length, bool)
                group["infos/stay_id"] = np.full(length + 1, stay_id, stay_ids.dtype)
        megabytes = (folder / MINARI_DATA).stat().st_size / 1e6
        metadata = {
            "dataset_id": dataset_id,
            "total_episodes": len(lengths),
            "total_steps": len(action),
            "data_format": "hdf5",
            "observation_space": json.dumps(_observation_space(episodes.num_steps, past)),
            "action_space": json.dumps(
                {"type": "Discrete", "dtype": "int64", "start": 0, "n": schema.NUM_ACTIONS}
            ),
            "minari_version": _MINARI_VERSION,
            "dataset_size": round(megabytes, 1),
        }
        write_json(folder / "metadata.json", metadata)


def _rows(episodes: Episodes, scaler: Scaler, past: int) -> Transitions:
    if not episodes.num_stays:
        raise InputError("export: there are no stays")
    return transitions(episodes, scaler, past=past)


def _observation_space(num_steps: int, past: int) -> dict[str, object]:
    """`decision_features` as Minari describes a box."""
    low, high = state_feature_bounds(num_steps - 1)
    rows = max(past - 1, 0)
    changes, rest = [_LARGEST_CHANGE] * schema.NUM_FEATURES, 3  # two levels, and whether it is
    bounds = {
        "low": [*low.tolist(), *([-change for change in changes] + [0.0] * rest) * rows],
        "high": [*high.tolist(), *(changes + [1.0] * rest) * rows],
    }
    return {"type": "Box", "dtype": "float32", "shape": [len(bounds["low"])], **bounds}
