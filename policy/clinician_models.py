"""Models of the clinicians' treatment probabilities, and their calibration."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Bool, Float, Int
from sklearn.cluster import MiniBatchKMeans

from policy.base import Policy
from worldmodel import schema, struct
from worldmodel.episodes import Episodes
from worldmodel.models.gru import gates
from worldmodel.observation import (
    NUM_STATE_FEATURES,
    Observation,
    ObservationHistory,
    observation_at,
    state_features,
)
from worldmodel.scaling import Scaler

_LARGEST = 5.0  # z-scores beyond are outliers that a small model should not chase
_INPUTS = NUM_STATE_FEATURES + 2 * schema.NUM_LEVELS
_ROW = schema.NUM_FEATURES + 3  # measurements, both levels, whether there was such a row
_OUTPUTS = schema.NUM_ACTIONS + 2 * schema.NUM_LEVELS


@struct.dataclass
class ClonedClinician(Policy):
    """A model of the recorded clinicians, with its calibration."""

    scaler: Scaler
    calibration: Calibration

    def logits(self, observation: Observation) -> Float[Array, " 25"]:
        """[25] before calibration."""
        raise NotImplementedError

    def __call__(self, key: jax.Array, observation: Observation) -> Float[Array, " 25"]:
        """[25] calibrated probabilities."""
        del key
        temperature, lapse = self.calibration
        probs = jax.nn.softmax(self.logits(observation) / temperature)
        return (1 - lapse) * probs + lapse / schema.NUM_ACTIONS


@struct.dataclass
class Logistic(ClonedClinician):
    """Multinomial logistic regression."""

    params: dict[str, jax.Array]

    def logits(self, observation: Observation) -> Float[Array, " 25"]:
        """[25] before calibration."""
        return _head(self.params, _inputs(observation, self.scaler))

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

    def logits(self, observation: Observation) -> Float[Array, " 25"]:
        """[25] before calibration."""
        x = _inputs(observation, self.scaler) @ self.params["in"] + self.params["in_bias"]
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

    def logits(self, observation: Observation) -> Float[Array, " 25"]:
        """[25] before calibration."""
        p = self.params
        assert observation.past is not None, "a GRU needs observations with Observation.past"
        projected = _rows(observation.past, self.scaler) @ p["row"] + p["row_bias"]

        def step(h: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            x, valid = row
            return jnp.where(valid, gates(x, h @ p["state"] + p["state_bias"], h), h), None

        start = jnp.zeros(p["state"].shape[0])
        h, _ = jax.lax.scan(step, start, (projected, observation.past.valid), unroll=self.past)
        x = _inputs(observation, self.scaler) @ p["in"] + h @ p["memory"] + p["in_bias"]
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

    def logits(self, observation: Observation) -> Float[Array, " 25"]:
        """[25] log-frequencies of the nearest cluster."""
        distance = (self.centers**2).sum(-1) - 2 * self.centers @ _inputs(observation, self.scaler)
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
        x = np.asarray(_inputs(observation_at(episodes, stay, step), scaler))
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


def _inputs(observation: Observation, scaler: Scaler) -> jax.Array:
    """[..., 59] the state, and the levels before as indicators: habits are no line in them."""
    levels = [
        jax.nn.one_hot(x, schema.NUM_LEVELS) for x in (observation.vasopressor, observation.fluid)
    ]
    return jnp.concatenate([state_features(observation, scaler), *levels], -1)


def _rows(past: ObservationHistory, scaler: Scaler) -> jax.Array:
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


_BINS = 10
_HALVINGS = 30
_ROUNDS = 30
_LARGEST_LOG_TEMPERATURE = 3.0  # of the logarithm of the temperature


def judge(
    probs: Float[np.ndarray, "N T A"], action: Int[np.ndarray, "N T"], used: Bool[np.ndarray, "N T"]
) -> tuple[dict[str, float], pd.DataFrame]:
    """Likelihood, accuracy and calibration of [N, T, A] probabilities on the steps `used` [N, T].

    The expected calibration error bins the probability of every action, not of the likeliest
    alone, since any of them may become the denominator of a weight. Bins hold equally many.

    Args:
      probs: [N, T, A].
      action: [N, T] int, the action taken.
      used: [N, T] bool.

    Returns:
      `nll` (nats), `top1`, `ece`, `least_taken` (least probability of an action that was taken)
      and `steps`; and the bins with `predicted`, `observed` frequency and `count`.
    """
    rows, taken = np.asarray(probs)[used], np.asarray(action)[used]
    chosen = rows[np.arange(len(taken)), taken]
    hit = np.zeros_like(rows)
    hit[np.arange(len(taken)), taken] = 1.0
    edges = np.quantile(rows, np.linspace(0, 1, _BINS + 1)[1:-1])
    place = np.searchsorted(edges, rows.reshape(-1))
    table = (
        pd.DataFrame({"bin": place, "predicted": rows.reshape(-1), "observed": hit.reshape(-1)})
        .groupby("bin")
        .agg(predicted=("predicted", "mean"), observed=("observed", "mean"),
             count=("observed", "size"))
        .reset_index(drop=True)
    )  # fmt: skip
    gap = (table["predicted"] - table["observed"]).abs()
    report = {
        "nll": float(-np.log(np.maximum(chosen, 1e-12)).mean()),
        "top1": float((rows.argmax(-1) == taken).mean()),
        "ece": float((gap * table["count"]).sum() / table["count"].sum()),
        "least_taken": float(chosen.min()),
        "steps": len(taken),
    }
    return report, table


class Calibration(NamedTuple):
    """(1 - lapse) softmax(logits / temperature) + lapse / A."""

    temperature: jax.Array  # []
    lapse: jax.Array  # [] share of decisions that no state explains


@jax.jit
def fit_calibration(logits: Float[Array, "M A"], action: Int[Array, " M"]) -> Calibration:
    """The likeliest temperature and lapse rate, by expectation-maximisation.

    A temperature alone cannot mend probabilities near 0, of which weights are made: a model that
    thinks an action next to impossible is wrong whenever somebody lapses (Wichmann & Hill 2001).

    Args:
      logits: [M, A]; log-probabilities will do.
      action: [M] int, the action taken.
    """
    rare = 1.0 / logits.shape[-1]

    def improve(_: int, now: Calibration) -> Calibration:
        probs = jax.nn.softmax(logits / now.temperature)
        chosen = jnp.take_along_axis(probs, action[:, None], -1)[:, 0]
        lapsed = now.lapse * rare / ((1 - now.lapse) * chosen + now.lapse * rare)
        return Calibration(fit_temperature(logits, action, 1 - lapsed), lapsed.mean())

    start = Calibration(fit_temperature(logits, action), jnp.float32(0.05))
    result: Calibration = jax.lax.fori_loop(0, _ROUNDS, improve, start)
    return result


@jax.jit
def fit_temperature(
    logits: Float[Array, "M A"], action: Int[Array, " M"], weight: jax.Array | float = 1.0
) -> Float[Array, ""]:
    """[] temperature T that makes softmax(logits / T) likeliest (Guo et al., ICML 2017).

    Args:
      logits: [M, A]; log-probabilities will do.
      action: [M] int, the action taken.
      weight: [M] of the rows.

    Returns:
      T within exp(-3) and exp(3): above 1 where the logits were too sure of themselves.
    """
    taken = jnp.take_along_axis(logits, action[:, None], -1)[:, 0]

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The likelihood is concave in 1 / T; its slope there is mean taken - expected logit.
        low, high = bounds
        middle = (low + high) / 2
        expected = (jax.nn.softmax(logits * jnp.exp(-middle)) * logits).sum(-1)
        too_sure = (weight * (taken - expected)).sum() < 0
        return jnp.where(too_sure, middle, low), jnp.where(too_sure, high, middle)

    start = (jnp.float32(-_LARGEST_LOG_TEMPERATURE), jnp.float32(_LARGEST_LOG_TEMPERATURE))
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, start)
    return jnp.exp((low + high) / 2)
