"""Steps per second of `SepsisEnv` on a learned world model, beside a Gymnasium loop.

    python scripts/bench_env.py --json benchmarks/env_cpu.json

A step is one 4-hour step of one patient: state model, projection, SOFA, reward. All run the same
world model (full size, untrained weights) with random actions, 20 decisions per episode:

- `gymnasium`: a Gymnasium environment as one writes it by hand over the plain model, one jitted
  step at a time, called from Python as an off-the-shelf agent calls it; the outcome model is
  asked at the end of the episode;
- `sepsis_env N`: `SepsisEnv` mapped over N patients and scanned over steps in one jitted call; the
  outcome model is asked at the end of the episode;
- `gymnasium, each` and `sepsis_env N, each`: the outcome model is asked in each step, the former
  through `worldmodel.gym.SepsisGymEnv`.

They take turns within each repeat, so that a busy machine slows all of them. Compilation is not
timed. Ratios are taken repeat by repeat, of the batch size with the best median to the Gymnasium
loop. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np

from sepsis_jax.benchmark.hardware import processor
from sepsis_jax.benchmark.jax_runners import DECISIONS, environment, random_episodes
from sepsis_jax.benchmark.timing import summary
from worldmodel import schema
from worldmodel.clinical import reward
from worldmodel.episodes import Episodes
from worldmodel.gym import SepsisGymEnv
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import WorldModel, init_world_model
from worldmodel.resources import usable_cores
from worldmodel.scaling import published_scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.step import advance
from worldmodel.synthetic import generate


class PlainEnv(gymnasium.Env):
    """A Gymnasium environment as one writes it by hand over the model."""

    def __init__(self, world_model: WorldModel, episodes: Episodes):
        self.starts = [
            start_history(world_model, episodes.select(slice(i, i + 1)), 0)
            for i in range(episodes.num_stays)
        ]
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (schema.NUM_FEATURES,))
        self.action_space = gymnasium.spaces.Discrete(schema.NUM_ACTIONS)
        self.world_model = world_model

        @jax.jit
        def move(model: WorldModel, history: Any, action: Any, eps: Any) -> Any:
            moved, outputs = advance(model, history, action, eps, mode="corrected")
            return moved, moved.obs[0, -1], outputs.reward[0]

        @jax.jit
        def outcome(model: WorldModel, history: Any, action: Any) -> Any:
            window = history.choose(action).window(schema.OUTCOME_WINDOW)
            return reward.terminal_reward(jax.nn.sigmoid(model.mortality_logit(*window)))[0]

        self.move, self.outcome = move, outcome

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.history = self.starts[self.np_random.integers(len(self.starts))]
        self.count = 0
        return np.asarray(self.history.obs[0, -1]), {}

    def step(self, action: Any) -> Any:
        given = np.asarray([action], np.int32)
        self.count += 1
        if self.count >= DECISIONS:
            last = float(self.outcome(self.world_model, self.history, given))
            return np.asarray(self.history.obs[0, -1]), last, True, False, {}
        eps = self.np_random.standard_normal((1, schema.NUM_FEATURES), np.float32)
        self.history, obs, earned = self.move(self.world_model, self.history, given, eps)
        return np.asarray(obs), float(earned), False, False, {}


def loop(env: gymnasium.Env, steps: int) -> None:
    """Random actions, one step at a time."""
    actions = np.random.default_rng(0).integers(0, schema.NUM_ACTIONS, steps)
    env.reset(seed=0)
    for action in actions:
        *_, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--steps", type=int, default=1000, help="steps of the loops per repeat")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()

    episodes, _ = generate(jax.random.key(0), 256, keep_latent=False)
    world_model = init_world_model(
        jax.random.key(1), published_scaler(), ModelConfig(variant="residual")
    )
    plain = PlainEnv(world_model, episodes)
    once, each = (environment(world_model, episodes, each_step=every) for every in (False, True))
    single = SepsisGymEnv(each)
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "gymnasium": (arguments.steps, lambda: loop(plain, arguments.steps)),
        "gymnasium, each": (arguments.steps, lambda: loop(single, arguments.steps)),
    }
    for batch in arguments.batches:
        for env, label in ((once, ""), (each, ", each")):
            runs[f"sepsis_env {batch}{label}"] = (
                batch * DECISIONS,
                partial(random_episodes, env, jax.random.key(2), batch),
            )
    for _, run in runs.values():
        jax.block_until_ready(run())

    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, (steps, run) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            rates[name].append(steps / (time.perf_counter() - start))

    rows = {name: summary(values) for name, values in rates.items()}
    ratios = {}
    for label in ("", ", each"):
        batched = [f"sepsis_env {batch}{label}" for batch in arguments.batches]
        best = max(batched, key=lambda name: rows[name]["median"])
        ratio = summary(np.divide(rates[best], rates[f"gymnasium{label}"]))
        ratios[f"{best} to gymnasium{label}"] = ratio
    print(f"{'':42s} {'median':>10s} {'min':>10s} {'max':>10s}")
    for name, row in rows.items():
        print(f"{name:42s} " + " ".join(f"{value:10,.0f}" for value in row.values()) + " steps/s")
    for name, row in ratios.items():
        print(f"{name:42s} " + " ".join(f"{value:10.1f}" for value in row.values()) + " x")
    result = {
        "steps_per_second": rows,
        "ratios": ratios,
        "repeats": arguments.repeats,
        "batches": arguments.batches,
        "hardware": {
            "device": jax.devices()[0].device_kind,
            "processor": processor(),
            "cores": usable_cores(),
        },
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "gymnasium": gymnasium.__version__,
        },
    }
    line = json.dumps(result)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(line)


if __name__ == "__main__":
    main()
