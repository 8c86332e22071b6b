"""Tool calls of a loop that waits for each answer: a jitted call per round, or one per call.

    python scripts/bench_tool_environments.py --out benchmarks/tool_environments_cpu.json

Synthetic patients; a world model of the published shape answers. A round is a simulation of three
treatments and a prescription in every environment, one environment after the other as TRL's
trainers call them, until the stay is over. `pool`: `policy.agent.speculative_pool`, which answers
for all patients and all 25 treatments. `single`: a jitted call per tool call, for that patient and
those treatments alone. Both take turns; compilation is not timed.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import numpy as np

from policy.agent.env_pool import EnvBatch, reset_batch
from policy.agent.forecast import ForecastConfig, Forecaster
from policy.agent.speculative_pool import SpeculativePool
from sepsis_jax.benchmark.hardware import hardware
from sepsis_jax.benchmark.setup import untrained_model
from sepsis_jax.benchmark.timing import seconds_of, summary
from sepsis_jax.runs import provenance
from worldmodel.envs.env import SepsisEnv
from worldmodel.files import write_json
from worldmodel.synthetic import Config, patient_keys

OPTIONS = (6, 7, 11)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--environments", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--samples", type=int, default=60, help="futures per simulated treatment")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    env = SepsisEnv.synthetic(config=Config(past=Forecaster.past))
    forecaster = Forecaster(
        untrained_model("highest"), jax.random.key(1), ForecastConfig(samples=arguments.samples)
    )
    result = provenance(
        hardware=hardware(), **{k: v for k, v in vars(arguments).items() if k != "out"}
    )
    for count in arguments.environments:
        patients = np.arange(count)
        batch = reset_batch(env, patient_keys(jax.random.key(0), patients), patients)
        runs = {
            name: partial(run, env, forecaster, batch, arguments.rounds)
            for name, run in (("pool", in_pool), ("single", one_by_one))
        }
        calls = {name: run() for name, run in runs.items()}  # compiles
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                seconds[name].append(seconds_of(run)[1] / arguments.rounds)
        ratios = [a / b for a, b in zip(seconds["single"], seconds["pool"], strict=True)]
        result[f"environments_{count}"] = {
            "jitted_calls_per_round": {k: v / arguments.rounds for k, v in calls.items()},
            "seconds_per_round": {name: summary(values) for name, values in seconds.items()},
            "ratio": summary(ratios),
        }
        for name, values in seconds.items():
            made, median = calls[name] / arguments.rounds, summary(values)["median"]
            print(f"{count:4d} environments, {name:6s}: {made:5.1f} calls, {median:.3f} s a round")
    if arguments.out:
        write_json(arguments.out, result)


def in_pool(env: SepsisEnv, forecaster: Forecaster, batch: EnvBatch, rounds: int) -> int:
    """Plays rounds; returns the number of jitted calls."""
    pool = SpeculativePool(env, forecaster)
    count = len(batch.patients)
    for slot in range(count):
        pool.reset(slot, batch, slot)
    treated = list(range(count))
    for number in range(rounds):
        for slot in treated:
            pool.simulate(slot, OPTIONS)
        treated = [s for s in treated if not pool.prescribe(s, (number + s) % 25).done]
    return sum(pool.calls.values())


def one_by_one(env: SepsisEnv, forecaster: Forecaster, batch: EnvBatch, rounds: int) -> int:
    """The same rounds."""
    actions = np.array([OPTIONS], np.int32)
    states = {row: row_of(batch.states, row) for row in range(len(batch.patients))}
    calls = 0
    for number in range(rounds):
        for slot, state in states.items():
            seen = jax.tree.map(lambda leaf: leaf[None], state.last.observation)
            forecaster(seen, batch.patients[slot : slot + 1], actions)
        moved = {}
        for slot, state in states.items():
            after, timestep = step(env, state, np.int32((number + slot) % 25))
            if not jax.device_get(timestep).done:
                moved[slot] = after
        calls += 2 * len(states)
        states = moved
    return calls


step = jax.jit(lambda env, state, action: env.step(state, action))
row_of = jax.jit(lambda states, row: jax.tree.map(lambda leaf: leaf[row], states))


if __name__ == "__main__":
    main()
