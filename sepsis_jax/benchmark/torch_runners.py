"""Torch contenders: batched rollouts, eager and compiled, and the published loop of batch size 1.

Rollouts follow the rules of `worldmodel.simulate` in corrected mode, written independently.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sepsis_jax.benchmark.setup import Workload
from sepsis_jax.benchmark.timing import Contender, seconds_of
from sepsis_jax.benchmark.torch_model import Tensor, TorchModels
from worldmodel import schema
from worldmodel.clinical import sofa
from worldmodel.models.world_model import WorldModel
from worldmodel.simulate.history import History

ONE_BRANCH = "torch, one branch"
EAGER = "torch, eager"
COMPILED = "torch, compiled"


def torch_device(torch: ModuleType, backend: str) -> str:
    """Where torch runs: beside JAX on its GPU if it can, else on the CPU."""
    return "cuda" if backend == "gpu" and torch.cuda.is_available() else "cpu"


def torch_contender(torch: ModuleType, job: Workload, device: str, name: str) -> Contender:
    """A rollout of a job in torch; all of its branches are one batch.

    Args:
      torch: from `load_torch`.
      job: workload to simulate.
      device: of torch.
      name: one of the names above.
    """
    torch_rollout = TorchRollout(torch, job.world_model, device, compiled=name == COMPILED)
    start, plans = job.flat()
    started = torch_rollout.start(start)
    actions = torch.tensor(np.asarray(plans, np.int64), device=device)

    def run(repeat: int) -> object:
        torch.manual_seed(repeat)
        found = torch_rollout.run(started, actions)
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _, first = seconds_of(lambda: run(0))
    _, second = seconds_of(lambda: run(0))
    return Contender(
        name=name,
        run=run,
        work=job.steps,
        branches=job.shape.branches,
        checksum=lambda found: float(sum(value.double().sum() for value in found.values())),
        compile_seconds=max(first - second, 0.0) if name == COMPILED else None,
        memory_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None,
    )


_SYSBP, _DIABP, _MEANBP = (schema.INDEX[name] for name in ("sysbp", "diabp", "meanbp"))
_LACTATE = schema.INDEX["lactate"]
_GCS = [schema.INDEX[name] for name in ("gcs_eye", "gcs_verbal", "gcs_motor")]
_SCORED = [schema.INDEX[name] for name in ("platelet", "bilirubin_total", "creatinine")]
# Ascending limits; a point for every one reached, or (first three) for every one missed.
_LIMITS = (
    (100, 200, 300, 400),  # PaO2 / FiO2
    (6, 10, 13, 15),  # Glasgow Coma Scale
    (20, 50, 100, 150),  # platelets
    (1.2, 2, 6, 12),  # bilirubin
    (1.2, 2, 3.5, 5),  # creatinine
)


class StepState(NamedTuple):
    """State of B branches before a treatment."""

    window: Tensor  # [B, 6, F] encoded rows up to the one before the newest, oldest first
    newest: Tensor  # [B, linear_rows, 87] the rows up to that one for the autoregression
    obs: Tensor  # [B, 39] the newest row, z-scores
    lactate: Tensor  # [B] mmol/L
    sofa: Tensor  # [B]
    urine: Tensor  # [B, U] mL per step
    step: Tensor  # [B] index of the newest row


class Constant(NamedTuple):
    """What does not change along a branch."""

    observed: Tensor  # [B, 38]
    static: Tensor  # [B, 3]
    embedded: Tensor  # [B, embed]


# The start's fields as tensors; the state before the first treatment; what stays the same.
Started = tuple[Any, StepState, Constant]


class TorchRollout:
    """Simulates branches in torch.

    Args:
      torch: from `load_torch`.
      world_model: of one member.
      device: of torch.
      compiled: compile the whole step with `torch.compile`.
    """

    def __init__(self, torch: ModuleType, world_model: WorldModel, device: str, *, compiled: bool):
        self.torch, self.device = torch, device
        self.models = TorchModels(torch, world_model, device, unrolled=compiled)
        scaler = world_model.scaler

        def tensor(values: object) -> Tensor:
            return torch.tensor(np.asarray(values, np.float32), device=device)

        self.mean, self.std = tensor(scaler.mean), tensor(scaler.std)
        self.low, self.high = (
            tensor(scaler.normalize(jnp.asarray(limit))) for limit in (schema.LOW, schema.HIGH)
        )
        self.limits = tensor(_LIMITS)
        doses = np.asarray(schema.level_doses(world_model.dose_edges.vasopressor))
        # Cardiovascular points of each level; below 0 where they depend on the pressure.
        self.on_drug = tensor(np.where(doses > 0.1, 4.0, np.where(doses > 0, 3.0, -1.0)))
        self.rows = world_model.config.linear_rows if self.models.residual else 0
        self.step: Callable[..., Any] = self._step
        self.mortality = self.models.mortality
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # one program per number of branches
            self.step = torch.compile(self._step, fullgraph=True, dynamic=False)
            self.mortality = torch.compile(self.mortality, fullgraph=True, dynamic=False)

    def start(self, begin: History) -> Started:
        """B branches at their start: their rows as tensors, their state, their constants."""
        torch, state = self.torch, self.models.state
        with torch.inference_mode():
            history = SimpleNamespace(
                **{
                    name: torch.tensor(np.asarray(value), device=self.device)
                    for name, value in vars(begin).items()
                    if value is not None  # a memory of the whole stay
                }
            )
            past = history.action[:, -7:-1].long()
            obs, observed = history.obs[:, -7:-1], history.observed[:, -7:-1]
            embedded = state.embed(history.static)
            expanded = embedded[:, None].expand(-1, schema.STATE_WINDOW, -1)
            newest = torch.cat([obs, observed, state.pairs[past]], -1)
            lactate = history.obs[:, -1, _LACTATE] * self.std[_LACTATE] + self.mean[_LACTATE]
            state_now = StepState(
                window=state.encode(obs, observed, expanded, past),
                newest=newest[:, schema.STATE_WINDOW - self.rows :].contiguous(),
                obs=history.obs[:, -1].contiguous(),
                lactate=lactate,
                sofa=history.sofa,
                urine=history.urine,
                step=history.step,
            )
            constant = Constant(history.observed[:, -1].contiguous(), history.static, embedded)
        state_now = StepState(*(value.contiguous() for value in state_now))
        return history, state_now, constant

    def run(
        self,
        started: Started,
        plans: Tensor,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Simulates all branches to the end.

        Args:
          started: from `start`.
          plans: [B, H] int64 joint actions.
          noise: [B, H, 39] standard normals; drawn where None.

        Returns:
          obs [B, H, 39] z-scores; values [B, H, 3] meanbp, lactate, urine; sofa, reward and
          ventilation [B, H]; mortality and projected [B].
        """
        torch = self.torch
        history, state_now, constant = started
        branches, horizon = plans.shape
        actions = [plans[:, h].clone() for h in range(horizon)]  # aligned alike
        kept: list[tuple[Tensor, ...]] = []
        with torch.inference_mode():
            for h in range(horizon):
                if noise is None:
                    eps = torch.randn(branches, schema.NUM_FEATURES, device=self.device)
                else:
                    eps = noise[:, h]
                state_now, outputs = self.step(state_now, constant, actions[h], eps)
                kept.append((state_now.obs, *outputs))
            obs, values, sofas, rewards, ventilation, projected = (
                torch.stack(column, 1) for column in zip(*kept, strict=True)
            )
            past = schema.OUTCOME_WINDOW - 1
            rows = torch.cat([history.obs, obs], 1)[:, -schema.OUTCOME_WINDOW :]
            masks = constant.observed[:, None].expand(-1, horizon, -1)
            masks = torch.cat([history.observed, masks], 1)[:, -schema.OUTCOME_WINDOW :]
            # The last treatment is continued.
            given = torch.cat([history.action[:, :past], plans, plans[:, -1:]], 1).long()
            given = given[:, -schema.OUTCOME_WINDOW :]
            mortality = self.mortality(rows, masks, constant.static, given)
        return {
            "obs": obs, "values": values, "sofa": sofas, "reward": rewards,
            "ventilation": ventilation, "mortality": mortality, "projected": projected.sum(1),
        }  # fmt: skip

    def _step(
        self, state_now: StepState, constant: Constant, action: Tensor, eps: Tensor
    ) -> tuple[StepState, tuple[Tensor, ...]]:
        """One step; returns the next state and (values, SOFA, reward, ventilation, projected)."""
        torch, state = self.torch, self.models.state
        row = state.encode(state_now.obs, constant.observed, constant.embedded, action)
        window = torch.cat([state_now.window[:, 1:], row[:, None]], 1)
        newest = state_now.newest
        if self.rows:
            raw = torch.cat([state_now.obs, constant.observed, state.pairs[action]], -1)
            newest = torch.cat([newest[:, 1:], raw[:, None]], 1)
        mu, log_sigma, logit = self.models.predict(window, newest, constant.static)
        obs, projected = self._project(mu + torch.exp(log_sigma) * eps)
        physical = obs * self.std + self.mean
        drained = torch.clamp(torch.expm1(physical[:, schema.URINE]), min=0.0)
        urine = torch.cat([state_now.urine[:, 1:], drained[:, None]], 1)
        step, ventilation = state_now.step + 1, torch.sigmoid(logit)
        length = urine.shape[1]
        per_day = urine.sum(1) * (length / torch.clamp(step + 1, max=length))
        score = self._sofa(physical, ventilation > 0.5, action // schema.NUM_LEVELS, per_day)
        lactate = physical[:, _LACTATE].clone()
        same = (score == state_now.sofa) & (score > 0)
        reward = (
            -0.025 * same
            - 0.125 * (score - state_now.sofa)
            - 2.0 * torch.tanh(lactate - state_now.lactate)
        )
        values = torch.stack([physical[:, _MEANBP], lactate, drained], 1)
        moved = StepState(window, newest, obs, lactate, score, urine, step)
        return moved, (values, score, reward, ventilation, projected)

    def _project(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        torch, mean, std = self.torch, self.mean, self.std
        obs = torch.clamp(drawn, self.low, self.high)
        pressure = obs[:, _MEANBP] * std[_MEANBP] + mean[_MEANBP]
        systolic = torch.maximum(obs[:, _SYSBP], (pressure - mean[_SYSBP]) / std[_SYSBP])
        diastolic = torch.minimum(obs[:, _DIABP], (pressure - mean[_DIABP]) / std[_DIABP])
        obs[:, _SYSBP], obs[:, _DIABP] = systolic, diastolic
        return obs, (obs != drawn).sum(1)

    def _sofa(
        self, physical: Tensor, ventilated: Tensor, vasopressor: Tensor, urine: Tensor
    ) -> Tensor:
        torch = self.torch
        fio2 = torch.clamp(physical[:, schema.INDEX["fio2"]], min=sofa.MIN_FIO2) / 100
        ratio = physical[:, schema.INDEX["pao2"]] / fio2
        gcs = physical[:, _GCS].sum(1)
        scored = torch.cat([ratio[:, None], gcs[:, None], physical[:, _SCORED]], 1)
        reached = (scored[..., None] >= self.limits).sum(-1).float()
        missed = 4.0 - reached[:, :3]
        respiratory = torch.where(ventilated, missed[:, 0], missed[:, 0].clamp(max=2.0))
        hypotensive = (physical[:, _MEANBP] < 70).float()
        on_drug = self.on_drug[vasopressor]
        heart = torch.where(on_drug > 0, on_drug, hypotensive)
        kidney = 3.0 * (urine < 500) + (urine < 200)
        return (
            respiratory + missed[:, 1] + missed[:, 2] + reached[:, 3] + heart
            + torch.maximum(reached[:, 4], kidney)
        )  # fmt: skip
