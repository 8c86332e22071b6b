"""Input of off-policy evaluation: recorded stays as arrays, and the checks of that input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from worldmodel import schema, struct
from worldmodel.clinical.reward import episode_rewards
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError


@struct.dataclass
class OPEData:
    """N recorded stays padded to T steps; nothing after the end of a stay is ever read."""

    reward: jax.Array  # [N, T] float32
    alive: jax.Array  # [N, T] bool, True on recorded steps, which come first
    action: jax.Array  # [N, T] int32
    behavior_prob: jax.Array  # [N, T] clinician's probability of the recorded action
    behavior_probs: jax.Array | None = None  # [N, T, A] of all actions
    features: jax.Array | None = None  # [N, T, D] of the state, for fitted values

    @property
    def num_stays(self) -> int:
        """Number of stays N."""
        return self.reward.shape[0]

    @property
    def num_steps(self) -> int:
        """Number of padded steps T."""
        return self.reward.shape[1]

    @property
    def length(self) -> Int[Array, " N"]:
        """[N] int32 number of recorded steps."""
        return self.alive.sum(1)

    def select(self, index: np.ndarray | slice) -> OPEData:
        """The stays picked by an index array or boolean mask [N]."""
        selected: OPEData = jax.tree.map(lambda leaf: leaf[index], self)
        return selected

    def returns(self, gamma: float = 1.0) -> Float[Array, " N"]:
        """[N] sum_t gamma^t r_t."""
        return (self.reward * gamma ** jnp.arange(self.num_steps)).sum(1)


@dataclass(frozen=True)
class InputPolicy:
    """What to do about flawed input; "error" refuses it, everything else is counted.

    Attributes:
      zero_behavior: the clinician's probability of a recorded action is 0. "drop" leaves the stay
        out, "floor" raises the probability to `floor`.
      row_sums: a row of action probabilities misses a sum of 1 by more than 0.001. "normalize"
        divides by the sum. Rows that miss it by less were rounded: they are divided and counted.
      missing_reward: a reward is NaN or infinite. "drop" leaves the stay out.
      floor: the least behaviour probability under "floor".
    """

    zero_behavior: str = "error"
    row_sums: str = "error"
    missing_reward: str = "error"
    floor: float = 0.001

    def __post_init__(self) -> None:
        for name, allowed in (
            ("zero_behavior", ("error", "drop", "floor")),
            ("row_sums", ("error", "normalize")),
            ("missing_reward", ("error", "drop")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )
        if not 0 < self.floor < 1:
            raise InputError(f"floor: got {self.floor}, expected between 0 and 1")


def from_episodes(
    episodes: Episodes,
    *,
    behavior_probs: Float[np.ndarray | Array, "N T 25"] | None = None,
    features: Float[Array, "N T D"] | None = None,
) -> OPEData:
    """Recorded stays for evaluation.

    Args:
      episodes: the stays.
      behavior_probs: [N, T, 25] the clinician's action probabilities; without them those of the
        recorded actions in `episodes.behavior_prob` are used.
      features: [N, T, D] for fitted values; see `sepsis_jax.ope.fqe`.

    Raises:
      InputError: no probabilities are known, or their shape is wrong.
    """
    if behavior_probs is not None:
        expected = (episodes.num_stays, episodes.num_steps, schema.NUM_ACTIONS)
        if np.shape(behavior_probs) != expected:
            raise InputError(
                f"behavior_probs: got shape {np.shape(behavior_probs)}, expected {expected}"
            )
        behavior_probs = jnp.asarray(behavior_probs, jnp.float32)
        taken = taken_probs(behavior_probs, episodes.action)
    else:
        taken = episodes.behavior_prob
        unknown = np.isnan(np.asarray(taken)) & np.asarray(episodes.valid)
        if unknown.any():
            stay = int(np.asarray(episodes.stay_id)[np.argwhere(unknown)[0, 0]])
            raise InputError(
                f"behavior_prob: unknown in {unknown.sum()} steps (first in stay {stay}); "
                "estimate the clinician's probabilities first (policy.clinician)"
            )
    return OPEData(
        reward=episode_rewards(episodes),
        alive=episodes.valid,
        action=episodes.action,
        behavior_prob=jnp.where(episodes.valid, taken, 1.0),
        behavior_probs=behavior_probs,
        features=features,
    )


def taken_probs(probs: Float[Array, "*#b A"], action: Int[Array, "*#b"]) -> Float[Array, "*#b"]:
    """[..., T] probabilities of the taken actions from [..., T, A] of all."""
    action = jnp.broadcast_to(action, probs.shape[:-1])
    return jnp.take_along_axis(probs, action[..., None], -1)[..., 0]


def pad(data: OPEData, steps: int) -> OPEData:
    """The same stays with `steps` more columns of padding."""

    def more(leaf: jax.Array, value: float) -> jax.Array:
        widths = ((0, 0), (0, steps), *((0, 0),) * (leaf.ndim - 2))
        return jnp.pad(leaf, widths, constant_values=value)

    padded: OPEData = jax.tree.map(lambda leaf: more(leaf, 0), data)
    return replace(padded, behavior_prob=more(data.behavior_prob, 1.0))


SUM_TOLERANCE = 1e-3
ROUNDING = 1e-5  # of sums of float32; what is off by more would grow with the length of a stay
BLOCK = 512  # stays: 1 MB of 20 steps and 25 actions


@dataclass(frozen=True)
class Rows:
    """Action probabilities as they were given, and what is to be done to them."""

    given: np.ndarray  # [N, T, A]
    alive: np.ndarray  # [N, T]
    divide: bool = False  # by the sum of the row

    def of(self, index: np.ndarray | slice, steps: int | None = None) -> Float[np.ndarray, "n t A"]:
        """[n, steps, A] float32 of the stays `index`, uniform on padding."""
        rows = self.given[index, :steps]
        rows = np.where(self.alive[index, :steps, None], rows, 1.0 / rows.shape[-1])
        rows = rows.astype(np.float32, copy=False)
        return rows / rows.sum(-1, keepdims=True) if self.divide else rows


class Inspected(NamedTuple):
    """Input in which every flaw was refused or has its input_policy."""

    small: OPEData  # [N, T] fields on the host, treated; nothing with a third axis
    policies: dict[str, Rows]
    behavior: Rows | None
    kept: np.ndarray  # [M] numbers of the stays that are not dropped
    steps: int  # of the longest of them
    counts: dict[str, int]

    def stays(self, index: np.ndarray) -> OPEData:
        """[n, T] fields of stays, trimmed; without features and `behavior_probs`."""
        trimmed: OPEData = jax.tree.map(lambda leaf: leaf[index, : self.steps], self.small)
        return trimmed


def inspect(
    data: OPEData,
    target_probs: Mapping[str, jax.Array | np.ndarray],
    input_policy: InputPolicy | None = None,
) -> Inspected:
    """`check` without copies of what is large; the same arguments and errors."""
    input_policy = input_policy or InputPolicy()
    # the same fields with leaves of NumPy
    host: Any = jax.tree.map(np.asarray, data)
    _check_shapes(host)
    alive = host.alive
    counts = {"stays_dropped": 0, "behavior_floored": 0, "rows_normalized": 0}
    action = _whole_actions(host.action, alive)
    keep = np.ones(len(alive), bool)

    missing = alive & ~np.isfinite(host.reward)
    if missing.any() and input_policy.missing_reward == "error":
        raise FlawError("reward", "NaN or infinite", missing, "missing_reward='drop'")
    keep &= ~missing.any(1)

    full = None
    behavior = np.where(alive, host.behavior_prob, 1.0)
    _check_unit("behavior_prob", ~_in_unit(behavior))
    behavior = np.minimum(behavior, 1.0)
    zero = behavior < np.finfo(np.float32).tiny  # what is smaller, JAX flushes to 0
    if zero.any() and input_policy.zero_behavior == "error":
        what = "0 for a recorded action, so no weight is defined"
        raise FlawError("behavior_prob", what, zero, "zero_behavior='drop' or 'floor'")
    if host.behavior_probs is not None:
        full, mended = _inspect_rows("behavior_probs", host.behavior_probs, alive, input_policy)
        counts["rows_normalized"] += mended
        _check_actions(action, alive, [full])
        behavior = _taken_of(full, action, alive & ~zero, behavior)
    if input_policy.zero_behavior == "drop":
        keep &= ~zero.any(1)
    elif input_policy.zero_behavior == "floor":
        counts["behavior_floored"] = int((behavior[keep] < input_policy.floor).sum())
        behavior = np.maximum(behavior, input_policy.floor)

    policies = {}
    for name, values in target_probs.items():
        array = np.asarray(values)
        if array.ndim != 3 or array.shape[:2] != alive.shape:
            raise InputError(
                f"policy {name!r}: got shape {array.shape}, expected {(*alive.shape, 'A')}"
            )
        policies[name], mended = _inspect_rows(f"policy {name!r}", array, alive, input_policy)
        counts["rows_normalized"] += mended
    _check_actions(action, alive, [*policies.values(), *([] if full is None else [full])])

    counts["stays_dropped"] = int((~keep).sum())
    if keep.sum() < 2:
        raise InputError(
            f"data: {keep.sum()} of {len(keep)} stays would be left, fewer than 2; mend the input"
        )
    small = host.replace(
        reward=np.where(alive, host.reward, 0.0).astype(np.float32),
        action=action,
        behavior_prob=behavior.astype(np.float32),
        behavior_probs=None,
        features=None,
    )
    steps = int(alive[keep].sum(1).max())
    return Inspected(small, policies, full, np.flatnonzero(keep), steps, counts)


def check(
    data: OPEData,
    target_probs: Mapping[str, jax.Array | np.ndarray],
    input_policy: InputPolicy | None = None,
) -> tuple[OPEData, dict[str, jax.Array], dict[str, int]]:
    """Refuses flawed input, or treats it as asked.

    Args:
      data: recorded stays.
      target_probs: [N, T, A] action probabilities by policy.
      input_policy: what to do about flaws that can be mended.

    Returns:
      Data and probabilities without flaws, trimmed to the longest stay, padding neutral; and how
      often each input_policy was applied, in steps or stays.

    Raises:
      InputError: a flaw that is not to be mended, or cannot be.
    """
    found = inspect(data, target_probs, input_policy)
    return (*clean(data, found), found.counts)


def clean(data: OPEData, found: Inspected) -> tuple[OPEData, dict[str, jax.Array]]:
    """Data and probabilities without flaws, from the data and what `inspect` found in them."""
    kept, steps = found.kept, found.steps
    cleaned = found.stays(kept)
    if found.behavior is not None:
        cleaned = replace(cleaned, behavior_probs=jnp.asarray(found.behavior.of(kept, steps)))
    if data.features is not None:
        features = _zero_after(np.asarray(data.features), np.asarray(found.small.alive))
        cleaned = replace(cleaned, features=jnp.asarray(features[kept, :steps]))
    probs = {name: jnp.asarray(rows.of(kept, steps)) for name, rows in found.policies.items()}
    on_device: OPEData = jax.tree.map(jnp.asarray, cleaned)
    return on_device, probs


def _check_shapes(data: OPEData) -> None:
    shape = data.reward.shape
    if len(shape) != 2:
        raise InputError(f"reward: got shape {shape}, expected [stays, steps]")
    for name in ("alive", "action", "behavior_prob"):
        if getattr(data, name).shape != shape:
            got = getattr(data, name).shape
            raise InputError(f"{name}: got shape {got}, but reward has {shape}; lengths must agree")
    for name in ("behavior_probs", "features"):
        value = getattr(data, name)
        if value is not None and (value.ndim != 3 or value.shape[:2] != shape):
            raise InputError(f"{name}: got shape {value.shape}, but reward has {shape}")
    if data.alive.dtype != np.bool_:
        raise InputError(f"alive: got {data.alive.dtype} values, expected booleans")
    empty = ~data.alive[:, 0] if shape[1] else np.ones(shape[0], bool)
    if shape[0] < 2 or empty.any():
        raise InputError(f"alive: {empty.sum()} of {shape[0]} stays have no step; need at least 2")
    gap = data.alive[:, 1:] & ~data.alive[:, :-1]
    if gap.any():
        raise FlawError("alive", "True after an end", np.asarray(gap), None)


def _in_unit(values: np.ndarray) -> np.ndarray:
    return (values >= 0) & (values <= 1 + SUM_TOLERANCE)


def _check_unit(name: str, outside: np.ndarray) -> None:
    """Refuses numbers [N, T] of values outside [0, 1] above 0."""
    if outside.any():
        raise FlawError(name, "outside [0, 1] or NaN", outside, None)


def _inspect_rows(
    name: str, given: np.ndarray, alive: np.ndarray, input_policy: InputPolicy
) -> tuple[Rows, int]:
    """Probabilities with what is to be done to them, and how many rows will be mended."""
    rows = Rows(given, alive)
    outside, total = np.empty(alive.shape, np.int32), np.empty(alive.shape, np.float32)
    for first in range(0, len(alive), BLOCK):
        block = slice(first, first + BLOCK)
        clean = rows.of(block)
        outside[block] = (~_in_unit(clean)).sum(-1)
        total[block] = clean.sum(-1)
    _check_unit(name, outside)
    off = np.abs(total - 1) > SUM_TOLERANCE
    if off.any() and (input_policy.row_sums == "error" or (total <= 0).any()):
        what = f"not summing to 1 (but to {total[off][0]:.6g})"
        raise FlawError(name, what, off, "row_sums='normalize'")
    mended = np.abs(total - 1) > ROUNDING
    return Rows(given, alive, bool(mended.any())), int(mended.sum())


def _whole_actions(action: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """[N, T] int32, 0 on padding; floats are taken only where they are whole numbers."""
    if action.dtype.kind not in "iuf":
        raise InputError(f"action: got {action.dtype} values, expected whole numbers")
    recorded = np.where(alive, action, 0)
    if action.dtype.kind == "f":
        broken = ~np.isfinite(recorded) | (recorded != np.round(recorded))
        if broken.any():
            raise FlawError("action", "not a whole number", broken, None)
    if (np.abs(recorded) > np.iinfo(np.int32).max).any():
        far = np.abs(recorded) > np.iinfo(np.int32).max
        raise FlawError("action", "too large", far, None)
    return recorded.astype(np.int32)


def _taken_of(
    full: Rows, action: np.ndarray, known: np.ndarray, behavior: np.ndarray
) -> np.ndarray:
    """[N, T] probabilities of the recorded actions, as their rows are divided; both must agree."""
    given = np.take_along_axis(full.given, action[..., None], -1)[..., 0]
    apart = known & (np.abs(given - behavior) > SUM_TOLERANCE * np.maximum(given, behavior) + 1e-6)
    if apart.any():
        what = "another probability of the recorded action than in behavior_probs"
        raise FlawError("behavior_prob", what, apart, None)
    if not full.divide:
        return behavior
    return behavior / np.where(known, full.given.sum(-1), 1.0)


def _check_actions(action: np.ndarray, alive: np.ndarray, probs: Iterable[Rows]) -> None:
    sizes = {rows.given.shape[-1] for rows in probs}
    if len(sizes) > 1:
        raise InputError(f"probabilities: numbers of actions differ: {sorted(sizes)}")
    top = min(sizes, default=schema.NUM_ACTIONS)
    bad = alive & ((action < 0) | (action >= top))
    if bad.any():
        raise FlawError("action", f"outside 0 to {top - 1}", bad, None)


class FlawError(InputError):
    """Flaws of the input, the first of them at a step of a stay.

    Args:
      name, what: of the flawed input, and what is wrong.
      bad: [N, T, ...] bool, where.
      remedy: a setting that would treat it, if there is one.
    """

    def __init__(self, name: str, what: str, bad: np.ndarray, remedy: str | None = None):
        self._stay, step = (int(i) for i in np.argwhere(bad)[0][:2])
        self._before = f"{name}: {what} in {int(bad.sum())} places, first at step {step} of stay "
        self._after = f"; mend the input, or choose {remedy}" if remedy else "; mend the input"
        super().__init__(f"{self._before}number {self._stay}{self._after}")

    def named(self, stay_id: np.ndarray) -> InputError:
        """The same with the stay's own id, of all ids [N]."""
        return InputError(f"{self._before}{stay_id[self._stay]}{self._after}")


def _zero_after(features: np.ndarray, alive: np.ndarray) -> np.ndarray:
    features = np.where(alive[..., None], features, 0.0).astype(np.float32)
    if not np.isfinite(features).all():
        bad = ~np.isfinite(features).all(-1)
        raise FlawError("features", "NaN or infinite", bad, None)
    return features
