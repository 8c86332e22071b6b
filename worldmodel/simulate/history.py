"""Rolling history of a patient: the window of rows, or the memory of the stay, that models read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from worldmodel import schema, struct
from worldmodel.clinical import sofa
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.models.recurrent import row_inputs
from worldmodel.models.recurrent_training import stay_row
from worldmodel.models.windows import Sequences, Window, encode_action, to_sequences
from worldmodel.models.world_model import WorldModel
from worldmodel.observation import Observation, ObservationHistory, recent


@struct.dataclass
class StayMemory:
    """What the recurrent variant knows of a stay besides the newest row; [B, ...]."""

    inputs: jax.Array  # [B, R, F] of the rows before the newest, oldest first
    valid: jax.Array  # [B, R] bool, the row exists
    value: jax.Array  # [B, 39] last measured values, z-scores
    age: jax.Array  # [B, 39] rows since then, infinite before the first
    measured: jax.Array  # [B, 39] bool, in the newest row
    before: jax.Array  # [B, 8] code of the treatment before
    sums: jax.Array  # [B, 30] decayed sums of the doses before


@struct.dataclass
class History:
    """The last rows of B patients (or branches); the treatment of the newest row is not chosen yet.

    Rows before ICU admission are zero, with action -1.
    """

    obs: jax.Array  # [B, 12, 39] z-scores
    observed: jax.Array  # [B, 12, 38] float32
    action: jax.Array  # [B, 12] int32 joint action 0-24; the newest is -1 until it is chosen
    static: jax.Array  # [B, 3] scaled
    urine: jax.Array  # [B, U] mL per step over 24 h, oldest first, 0 before admission
    sofa: jax.Array  # [B] SOFA of the newest row
    ventilated: jax.Array  # [B] bool
    step: jax.Array  # [B] int32 index of the newest row, 0 at admission
    patient: jax.Array  # [B] int32 identity, which the noise depends on
    memory: StayMemory | None = None  # of the whole stay; recurrent variant only

    def window(self, width: int) -> Window:
        """Model inputs of the newest `width` rows."""
        return Window(
            obs=self.obs[..., -width:, :],
            observed=self.observed[..., -width:, :],
            static=self.static,
            action=encode_action(self.action[..., -width:]),
        )

    def choose(self, action: Int[Array, " B"]) -> History:
        """Sets the treatment [B] of the newest row."""
        return replace(self, action=self.action.at[..., -1].set(action))

    def append(
        self,
        obs: Float[Array, "B 39"],
        urine: Float[Array, " B"],
        ventilated: Shaped[Array, " B"],
        observed: Shaped[Array, "B 38"] | None = None,
    ) -> History:
        """Appends a row without its SOFA.

        Args:
          obs: [B, 39] z-scores.
          urine: [B] mL.
          ventilated: [B] bool.
          observed: [B, 38] which values are measured; None: those of the last row.
        """
        if observed is None:
            observed = self.observed[:, -1]

        def push(rows: jax.Array, row: jax.Array) -> jax.Array:
            return jnp.concatenate([rows[:, 1:], row[:, None]], axis=1)

        return replace(
            self,
            obs=push(self.obs, obs),
            observed=push(self.observed, observed.astype(self.observed.dtype)),
            action=push(self.action, jnp.full_like(self.action[:, -1], -1)),
            urine=push(self.urine, urine),
            ventilated=ventilated,
            step=self.step + 1,
        )

    def urine_24h(self) -> Float[Array, " B"]:
        """Urine of the last 24 h, mL, scaled up where the stay is shorter: [B]."""
        return urine_per_day(self.urine.sum(-1), self.step, self.urine.shape[-1])


def urine_per_day(
    total: Float[Array, "*#b"], step: Int[Array, "*#b"], window: int
) -> Float[Array, "*#b"]:
    """Urine of the last 24 h, mL, scaled up where the stay is shorter.

    Args:
      total: [...] mL in the last `window` rows, 0 before admission.
      step: [...] int32 index of the newest of them, 0 at admission.
      window: rows in 24 h.
    """
    return total * (window / jnp.minimum(step + 1, window))


def observe(world_model: WorldModel, history: History, *, past: int = 0) -> Observation:
    """The observations of B patients in a world model, leaves [B, ...].

    Args:
      world_model: whose scaler is used.
      history: of the patients; the treatment of the newest row is not chosen yet.
      past: rows of `Observation.past`, at most 12.
    """
    scaler = world_model.scaler
    vasopressor, fluid = schema.action_levels(jnp.maximum(history.action, 0))
    dynamic = scaler.denormalize(history.obs[..., -max(past, 1) :, :])
    rows = slice(-past, None)
    valid = history.step[..., None] + jnp.arange(1 - past, 1) >= 0
    return Observation(
        dynamic=dynamic[..., -1, :],
        measured=history.observed[..., -1, :] > 0,
        static=scaler.denormalize_static(history.static),
        ventilated=history.ventilated,
        sofa=history.sofa,
        urine_24h=history.urine_24h(),
        vasopressor=vasopressor[..., -2],
        fluid=fluid[..., -2],
        step=history.step,
        past=ObservationHistory(
            dynamic=jnp.where(valid[..., None], dynamic, 0.0),
            measured=history.observed[..., rows, :] > 0,
            vasopressor=vasopressor[..., rows],
            fluid=fluid[..., rows],
            valid=valid,
        )
        if past
        else None,
    )


def history_from_observation(world_model: WorldModel, observation: Observation) -> History:
    """The inverse of `observe`: the history of one patient, as a batch of one.

    Args:
      world_model: whose scaler is used.
      observation: of one patient, with at least 12 rows of `Observation.past`.

    Raises:
      InputError: the observation has too few past rows.
    """
    steps = _urine_steps(world_model)
    rows = max(schema.OUTCOME_WINDOW, steps)
    past = recent(observation, rows).past
    assert past is not None
    valid, scaler = past.valid, world_model.scaler
    window = slice(-schema.OUTCOME_WINDOW, None)
    action = jnp.where(valid, schema.action_index(past.vasopressor, past.fluid), -1)
    urine = jnp.where(valid, past.dynamic[:, schema.URINE], 0.0)
    history = History(
        obs=jnp.where(valid[:, None], scaler.normalize(past.dynamic), 0.0)[window],
        observed=(past.measured & valid[:, None]).astype(jnp.float32)[window],
        action=action.at[-1].set(-1)[window],
        static=scaler.normalize_static(observation.static),
        urine=urine[-steps:],
        sofa=observation.sofa,
        ventilated=observation.ventilated,
        step=observation.step,
        patient=jnp.int32(0),
    )
    if world_model.is_recurrent:
        history = replace(history, memory=_observed_memory(world_model, observation, history, past))
    result: History = jax.tree.map(lambda leaf: leaf[None], history)
    return result


def _urine_steps(world_model: WorldModel) -> int:
    return max(round(sofa.WINDOW_HOURS / world_model.step_hours), 1)


def start_history(
    world_model: WorldModel,
    episodes: Episodes,
    step: int | np.ndarray | jax.Array,
    *,
    recorded_sofa: bool = False,
) -> History:
    """Patients at a recorded row, about to be treated.

    Args:
      world_model: whose scaler and dose edges are used.
      episodes: P stays.
      step: row to start from, one for all or [P].
      recorded_sofa: take SOFA from the record (reference mode) instead of scoring the row as
        simulated rows are scored.

    Raises:
      InputError: a stay has no such row.
    """
    step = np.broadcast_to(np.asarray(step, np.int32), (episodes.num_stays,))
    short = (step < 0) | (step >= np.asarray(episodes.length))
    if short.any():
        stay = int(np.asarray(episodes.stay_id)[np.argmax(short)])
        last = int(np.asarray(episodes.length)[np.argmax(short)]) - 1
        raise InputError(
            f"step: stay {stay} has rows 0 to {last}, got {int(step[np.argmax(short)])}"
        )
    result: History = _start_history(world_model, episodes, step, recorded_sofa=recorded_sofa)
    return result


@partial(jax.jit, static_argnames="recorded_sofa")
def _start_history(
    world_model: WorldModel, episodes: Episodes, step: jax.Array, *, recorded_sofa: bool
) -> History:
    return history_at(
        world_model,
        episodes,
        to_sequences(episodes, world_model.scaler),
        np.arange(episodes.num_stays),
        step,
        recorded_sofa=recorded_sofa,
    )


def history_at(
    world_model: WorldModel,
    episodes: Episodes,
    sequences: Sequences,
    stays: Int[np.ndarray | Array, " B"],
    step: Int[Array, " B"],
    *,
    recorded_sofa: bool,
) -> History:
    """`start_history` of the rows (stays, step), both [B] and unchecked; works on traced values.

    Args:
      world_model: whose scaler and dose edges are used.
      episodes: the stays.
      sequences: `to_sequences` of them.
      stays, step: [B] int32 indices.
      recorded_sofa: as in `start_history`.
    """
    stays = jnp.asarray(stays)
    window = sequences.window(jnp.stack([stays, step], axis=1), schema.OUTCOME_WINDOW)
    rows = step[:, None] + jnp.arange(1 - schema.OUTCOME_WINDOW, 1)
    action = sequences.action[stays[:, None], sequences.padding + rows].at[:, -1].set(-1)
    urine_steps = _urine_steps(world_model)
    urine_rows = step[:, None] + jnp.arange(1 - urine_steps, 1)
    urine = episodes.dynamic[stays[:, None], jnp.maximum(urine_rows, 0), schema.URINE]
    history = History(
        obs=window.obs,
        observed=window.observed,
        action=action,
        static=window.static,
        urine=jnp.where(urine_rows >= 0, urine, 0.0),
        sofa=episodes.sofa[stays, step],
        ventilated=episodes.ventilated[stays, step],
        step=step,
        patient=jnp.asarray(episodes.stay_id).astype(jnp.int32)[stays],
        memory=_recorded_memory(world_model, sequences, stays, step),
    )
    if recorded_sofa:
        return history
    given = jnp.where(step > 0, episodes.vasopressor_dose[stays, jnp.maximum(step - 1, 0)], 0.0)
    score = sofa.standard(
        episodes.dynamic[stays, step],
        ventilated=history.ventilated,
        vasopressor_dose=given,
        urine_24h=history.urine_24h(),
    )
    return replace(history, sofa=score.total)


def _recorded_memory(
    world_model: WorldModel, sequences: Sequences, stays: jax.Array, step: jax.Array
) -> StayMemory | None:
    if not world_model.is_recurrent:
        return None
    recorded = slice(sequences.padding, None)
    rows = sequences.num_steps
    memory: StayMemory = stay_memory(
        world_model.dose_edges,
        obs=sequences.obs[stays, recorded],
        measured=sequences.measured[stays, recorded],
        ventilated=sequences.ventilated[stays, recorded],
        static=sequences.static[stays],
        action=sequences.action[stays, recorded],
        step=jnp.broadcast_to(jnp.arange(rows), (stays.shape[0], rows)),
        newest=step,
    )
    return memory


def _observed_memory(
    world_model: WorldModel, observation: Observation, history: History, past: ObservationHistory
) -> StayMemory:
    """From the rows that an observation holds, [12, ...]; exact for stays that are no longer.

    Earlier rows are forgotten, and their ventilation is taken to be that of the newest row, since
    observations do not hold it.
    """
    rows = slice(-schema.OUTCOME_WINDOW, None)
    valid = past.valid[rows]
    urine = (past.dynamic[rows, schema.URINE :] > 0) & valid[:, None]
    memory = stay_memory(
        world_model.dose_edges,
        obs=history.obs[None],
        measured=jnp.concatenate([history.observed > 0, urine], axis=-1)[None],
        ventilated=(valid & observation.ventilated)[None],
        static=history.static[None],
        action=history.action[None],
        step=jnp.where(valid, observation.step + jnp.arange(1 - valid.shape[0], 1), -1)[None],
        newest=jnp.full(1, valid.shape[0] - 1),
    )
    result: StayMemory = jax.tree.map(lambda leaf: leaf[0], memory)
    return result


@partial(jax.jit, static_argnames="dose_edges")
def stay_memory(
    dose_edges: schema.DoseEdges,
    *,
    obs: jax.Array,
    measured: jax.Array,
    ventilated: jax.Array,
    static: jax.Array,
    action: jax.Array,
    step: jax.Array,
    newest: jax.Array,
) -> StayMemory:
    """The memory of B stays; works on traced values.

    Args:
      dose_edges: what the levels stand for.
      obs, measured: [B, T, 39] z-scores and what was recorded.
      ventilated: [B, T] bool.
      static: [B, 3] scaled.
      action: [B, T] joint action 0-24; -1 where there was no row.
      step: [B, T] int32 number of the row, below 0 where there was none.
      newest: [B] int32 index of the newest row, about to be treated.
    """
    rows = stay_row(obs, measured, ventilated, static, action, dose_edges, step)
    index = jnp.arange(obs.shape[1])
    known = (index <= newest[:, None]) & (step >= 0)
    last = jnp.where(measured & known[..., None], index[:, None], -1).max(1)  # [B, 39]
    age = jnp.where(last >= 0, newest[:, None] - last, jnp.inf)

    def at_newest(leaf: jax.Array) -> jax.Array:
        return leaf[jnp.arange(leaf.shape[0]), newest]

    value = jnp.take_along_axis(obs, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    return StayMemory(
        inputs=row_inputs(rows),
        valid=known & (index < newest[:, None]),
        value=jnp.where(last >= 0, value, at_newest(obs)),
        age=age.astype(jnp.float32),
        measured=at_newest(measured),
        before=at_newest(rows.before),
        sums=at_newest(rows.sums),
    )
