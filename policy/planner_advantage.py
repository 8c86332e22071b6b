"""Advantages of the 25 actions over the clinician, learned from records by A-learning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from policy.base import decision_features, feature_width
from worldmodel import schema, struct
from worldmodel.observation import Observation, recent
from worldmodel.scaling import Scaler

PAST = 4  # rows of the features that stand for the state
_AT = schema.INDEX
_EFFECTS = ("meanbp", "lactate", "output_4hourly", "heart_rate", "creatinine", "hemoglobin")
_NUM_MODERATORS, _NUM_EFFECTS = 16, 2 + len(_EFFECTS)
_LEVELS = np.stack(schema.action_levels(np.arange(schema.NUM_ACTIONS))) / (schema.NUM_LEVELS - 1)


def dose_basis() -> np.ndarray:
    """[25, 6] v, v^2, any vasopressor, f, f^2, v f of the levels scaled to [0, 1]."""
    v, f = _LEVELS
    return np.stack([v, v**2, v > 0, f, f**2, v * f], -1).astype(np.float32)


def moderators(observation: Observation, scaler: Scaler) -> jax.Array:
    """[..., 16] what may change the use of a dose: pressure, perfusion, organs, time, treatment."""
    z = jnp.clip(scaler.normalize(observation.dynamic), -4.0, 4.0)
    pressure = observation.dynamic[..., _AT["meanbp"]]
    oxygen = 100.0 * observation.dynamic[..., _AT["pao2"]] / observation.dynamic[..., _AT["fio2"]]
    names = ("lactate", "output_4hourly", "heart_rate", "creatinine", "hemoglobin", "bicarbonate")
    top = schema.NUM_LEVELS - 1
    columns = [
        jnp.ones_like(pressure),
        (pressure - 70.0) / 10.0,
        jnp.maximum(65.0 - pressure, 0.0) / 5.0,
        jnp.maximum(pressure - 80.0, 0.0) / 10.0,
        *(z[..., _AT[name]] for name in names),
        jnp.log(jnp.clip(oxygen, 30.0, 700.0) / 200.0),
        jnp.exp(-observation.step / 3.0),
        observation.step / 20.0,
        observation.vasopressor / top,
        observation.fluid / top,
        observation.ventilated.astype(jnp.float32),
    ]
    return jnp.stack(columns, -1)


def effects(mu: jax.Array, scaler: Scaler) -> jax.Array:
    """[..., 8] of predicted next states [..., 39] in z-scores: levels, and MAP out of range."""
    at = _AT["meanbp"]
    pressure = mu[..., at] * scaler.std[at] + scaler.mean[at]
    columns = [
        jnp.maximum(65.0 - pressure, 0.0) / 5.0,
        jnp.maximum(pressure - 80.0, 0.0) / 10.0,
        *(mu[..., _AT[name]] for name in _EFFECTS),
    ]
    return jnp.stack(columns, -1)


@struct.dataclass
class Advantage:
    """A linear advantage over the clinician's policy, in units of reward."""

    doses: jax.Array  # [16, 6] by moderator and dose
    effects: jax.Array  # [8]
    usual: jax.Array  # [D, 8] effects that the clinician's policy has, linear in the features
    scaler: Scaler

    def of_actions(self, observation: Observation, mu: jax.Array, prior: jax.Array) -> jax.Array:
        """Advantage [..., 25] of all actions.

        Args:
          observation: of one patient.
          mu: [..., 25, 39] predicted next states, z-scores; leading axes for ensemble members.
          prior: [25] the clinician's probabilities.
        """
        doses = self._of_doses(observation, prior)
        return doses + (effects(mu, self.scaler) - self._usual(observation)) @ self.effects

    def of_action(
        self, observation: Observation, mu: jax.Array, prior: jax.Array, action: jax.Array
    ) -> jax.Array:
        """[] advantage of one action, whose predicted next state is mu [39]."""
        gain = (effects(mu, self.scaler) - self._usual(observation)) @ self.effects
        return self._of_doses(observation, prior)[action] + gain

    def _of_doses(self, observation: Observation, prior: jax.Array) -> jax.Array:
        basis = jnp.asarray(dose_basis())
        return (basis - prior @ basis) @ (moderators(observation, self.scaler) @ self.doses)

    def _usual(self, observation: Observation) -> jax.Array:
        return decision_features(recent(observation, PAST), self.scaler) @ self.usual


def fit_advantage(
    features: np.ndarray,
    moderator: np.ndarray,
    effect: np.ndarray,
    prior: np.ndarray,
    action: np.ndarray,
    gain: np.ndarray,
    scaler: Scaler,
    *,
    ridge: float = 100.0,
) -> Advantage:
    """Least squares of residuals on residuals.

    Args:
      features: [M, D] `decision_features` with PAST rows.
      moderator: [M, 16] of the states.
      effect: [M, 8] predicted for the action taken.
      prior: [M, 25] the clinician's probabilities.
      action: [M] taken.
      gain: [M] r + gamma V(s') - V(s).
      scaler: of everything above; kept.
      ridge: penalty on the squared coefficients, in rows.
    """
    state = np.concatenate([features, moderator[:, 1:]], 1).astype(np.float64)
    solved = np.linalg.inv(state.T @ state + 10.0 * np.eye(state.shape[1]))
    features = features.astype(np.float64)
    usual = np.linalg.solve(
        features.T @ features + 10.0 * np.eye(features.shape[1]), features.T @ effect
    )
    basis = dose_basis()
    doses = moderator[:, :, None] * (basis[action] - prior @ basis)[:, None, :]
    columns = np.concatenate([doses.reshape(len(action), -1), effect - features @ usual], 1)
    residual = gain - state @ (solved @ (state.T @ gain))
    theta = np.linalg.solve(
        columns.T @ columns + ridge * np.eye(columns.shape[1]), columns.T @ residual
    )
    split = moderator.shape[1] * basis.shape[1]
    return Advantage(
        doses=jnp.asarray(theta[:split].reshape(moderator.shape[1], -1), jnp.float32),
        effects=jnp.asarray(theta[split:], jnp.float32),
        usual=jnp.asarray(usual, jnp.float32),
        scaler=scaler,
    )


def untrained_advantage(scaler: Scaler) -> Advantage:
    """An advantage of zero."""
    doses = jnp.zeros((_NUM_MODERATORS, dose_basis().shape[1]))
    return Advantage(
        doses, jnp.zeros(_NUM_EFFECTS), jnp.zeros((feature_width(PAST), _NUM_EFFECTS)), scaler
    )
