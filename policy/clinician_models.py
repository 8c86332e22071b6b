"""Models of the clinicians: policies that treat as the records do.

All see the state and the levels given before; `GRU` sees the rows before as well.
`policy.clinician` fits them.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from sklearn.cluster import MiniBatchKMeans

from policy.base import Policy
from policy.calibration import Calibration
from worldmodel import schema
from worldmodel.episodes import Episodes
from worldmodel.features import NUM_STATE_FEATURES, state_features
from worldmodel.models.gru import gates
from worldmodel.scaling import Scaler
from worldmodel.view import Past, View, view_at

_LARGEST = 5.0  # z-scores beyond are outliers that a small model should not chase
_INPUTS = NUM_STATE_FEATURES + 2 * schema.NUM_LEVELS
_ROW = schema.NUM_FEATURES + 3  # measurements, both levels, whether there was such a row
_OUTPUTS = schema.NUM_ACTIONS + 2 * schema.NUM_LEVELS


@struct.dataclass
class ClonedClinician(Policy):
    """A model of the recorded clinicians, with its calibration."""

    scaler: Scaler
    calibration: Calibration

    def logits(self, view: View) -> jax.Array:
        """[25] before calibration."""
        raise NotImplementedError

    def __call__(self, key: jax.Array, view: View) -> jax.Array:
        """[25] calibrated probabilities."""
        del key
        temperature, lapse = self.calibration
        probs = jax.nn.softmax(self.logits(view) / temperature)
        return (1 - lapse) * probs + lapse / schema.NUM_ACTIONS


@struct.dataclass
class Logistic(ClonedClinician):
    """Multinomial logistic regression."""

    params: dict[str, jax.Array]

    def logits(self, view: View) -> jax.Array:
        """[25] before calibration."""
        return _head(self.params, _inputs(view, self.scaler))

    @classmethod
    def initial(cls, key: jax.Array, scaler: Scaler, hidden: int) -> Logistic:
        """Untrained."""
        del hidden
        params = {"out": 0.1 * _matrix(key, _INPUTS, _OUTPUTS), "bias": jnp.zeros(_OUTPUTS)}
        return cls(scaler, uncalibrated(), params)


@struct.dataclass
class MLP(ClonedClinician):
    """One hidden layer."""

    params: dict[str, jax.Array]

    def logits(self, view: View) -> jax.Array:
        """[25] before calibration."""
        x = _inputs(view, self.scaler) @ self.params["in"] + self.params["in_bias"]
        return _head(self.params, jax.nn.relu(x))

    @classmethod
    def initial(cls, key: jax.Array, scaler: Scaler, hidden: int) -> MLP:
        """Untrained."""
        first, last = jax.random.split(key)
        params = {
            "in": _matrix(first, _INPUTS, hidden),
            "in_bias": jnp.zeros(hidden),
            "out": _matrix(last, hidden, _OUTPUTS),
            "bias": jnp.zeros(_OUTPUTS),
        }
        return cls(scaler, uncalibrated(), params)


@struct.dataclass
class GRU(ClonedClinician):
    """The MLP with the last state of a gated recurrent unit over the last rows as further input."""

    params: dict[str, jax.Array]
    past: ClassVar[int] = schema.STATE_WINDOW

    def logits(self, view: View) -> jax.Array:
        """[25] before calibration."""
        p = self.params
        assert view.past is not None, "a GRU needs views with View.past"
        projected = _rows(view.past, self.scaler) @ p["row"] + p["row_bias"]

        def step(h: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            x, valid = row
            return jnp.where(valid, gates(x, h @ p["state"] + p["state_bias"], h), h), None

        start = jnp.zeros(p["state"].shape[0])
        h, _ = jax.lax.scan(step, start, (projected, view.past.valid), unroll=self.past)
        x = _inputs(view, self.scaler) @ p["in"] + h @ p["memory"] + p["in_bias"]
        return _head(p, jax.nn.relu(x))

    @classmethod
    def initial(cls, key: jax.Array, scaler: Scaler, hidden: int) -> GRU:
        """Untrained."""
        mlp_key, row, state, memory = jax.random.split(key, 4)
        params = {
            **MLP.initial(mlp_key, scaler, hidden).params,
            "row": _matrix(row, _ROW, 3 * hidden),
            "row_bias": jnp.zeros(3 * hidden),
            "state": _matrix(state, hidden, 3 * hidden),
            "state_bias": jnp.zeros(3 * hidden),
            "memory": _matrix(memory, hidden, hidden),
        }
        return cls(scaler, uncalibrated(), params)


@struct.dataclass
class Clusters(ClonedClinician):
    """Smoothed counts of actions in clusters of states, as in the AI Clinician (Komorowski 2018).

    Nothing is trained by gradients. A single cluster is the marginal distribution.
    """

    centers: jax.Array  # [K, D]
    log_probs: jax.Array  # [K, 25]

    def logits(self, view: View) -> jax.Array:
        """[25] log-frequencies of the nearest cluster."""
        distance = (self.centers**2).sum(-1) - 2 * self.centers @ _inputs(view, self.scaler)
        return self.log_probs[jnp.argmin(distance)]

    @classmethod
    def fit(
        cls,
        key: jax.Array,
        episodes: Episodes,
        rows: tuple[np.ndarray, np.ndarray],
        scaler: Scaler,
        clusters: int,
        smoothing: float,
    ) -> Clusters:
        """Mini-batch k-means on the rows (stay, step), then counts."""
        stay, step = map(jnp.asarray, rows)
        x = np.asarray(_inputs(view_at(episodes, stay, step), scaler))
        action = np.asarray(episodes.action)[rows]
        base = np.bincount(action, minlength=schema.NUM_ACTIONS) + 1.0
        base = base / base.sum()
        counts = np.tile(smoothing * base, (clusters, 1))
        if clusters == 1:
            centers, place = np.zeros((1, _INPUTS)), np.zeros(len(action), int)
        else:
            seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
            found = MiniBatchKMeans(clusters, random_state=seed, n_init=1, batch_size=4096).fit(x)
            centers, place = found.cluster_centers_, found.labels_
        np.add.at(counts, (place, action), 1.0)
        probs = counts / counts.sum(-1, keepdims=True)
        return cls(
            scaler,
            uncalibrated(),
            jnp.asarray(centers, jnp.float32),
            jnp.log(jnp.asarray(probs, jnp.float32)),
        )


def _inputs(view: View, scaler: Scaler) -> jax.Array:
    """[..., 59] the state, and the levels before as indicators: habits are no line in them."""
    levels = [jax.nn.one_hot(x, schema.NUM_LEVELS) for x in (view.vasopressor, view.fluid)]
    return jnp.concatenate([state_features(view, scaler), *levels], -1)


def _rows(past: Past, scaler: Scaler) -> jax.Array:
    """[..., H, 42] of each row: z-scores, both levels given, whether there was such a row."""
    z = jnp.clip(scaler.normalize(past.dynamic), -_LARGEST, _LARGEST)
    levels = jnp.stack([past.vasopressor, past.fluid], -1) / (schema.NUM_LEVELS - 1)
    return jnp.concatenate([z, levels, past.valid[..., None].astype(jnp.float32)], -1)


def uncalibrated() -> Calibration:
    """The calibration that leaves a model as it is."""
    return Calibration(jnp.ones(()), jnp.zeros(()))


def _matrix(key: jax.Array, rows: int, columns: int) -> jax.Array:
    return jax.random.normal(key, (rows, columns)) / jnp.sqrt(rows)


def _head(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """[25] logits: one per drug and level, and one per pair of levels for what they leave."""
    out = x @ params["out"] + params["bias"]
    n = schema.NUM_LEVELS
    each = out[..., :n, None] + out[..., None, n : 2 * n]
    return out[..., 2 * n :] + each.reshape(*out.shape[:-1], schema.NUM_ACTIONS)
