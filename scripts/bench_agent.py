"""How fast dialogues run when the language model takes no time.

    python scripts/bench_agent.py --out benchmarks/agent_cpu.json

Synthetic patients, a scripted agent that simulates three treatments and prescribes one at every
decision; a world model of the published shape answers. Counts answered tool calls.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from policy.agent.dialogue import COMPLETED, DialogueConfig, Stay, treat_all
from policy.agent.env_pool import EnvPool, reset_batch
from policy.agent.forecast import ForecastConfig, Forecaster
from policy.agent.prompts import OWN_SETS, Prompts
from policy.agent.scripted import ScriptedBackend, simulate_and_prescribe
from sepsis_jax.benchmark.hardware import hardware
from sepsis_jax.benchmark.setup import untrained_model
from sepsis_jax.benchmark.timing import seconds_of, summary
from sepsis_jax.runs import provenance
from worldmodel.envs.env import SepsisEnv
from worldmodel.files import write_json
from worldmodel.synthetic import Config, patient_keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--patients", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12, help="decisions per patient, at most")
    parser.add_argument("--samples", type=int, default=60, help="futures per simulated treatment")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()

    env = SepsisEnv.synthetic(config=Config(past=Forecaster.past), max_steps=arguments.steps)
    forecaster = Forecaster(
        untrained_model("highest"), jax.random.key(1), ForecastConfig(samples=arguments.samples)
    )
    runs = {name: partial(whole_run, env, forecaster, name, arguments) for name in OWN_SETS}
    first = {name: seconds_of(partial(run, 0))[1] for name, run in runs.items()}
    compiled = count_compilations(runs["compact"])
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats):
        for name, run in runs.items():
            calls, seconds = seconds_of(partial(run, repeat))
            rates[name].append(calls / seconds)

    result = provenance(
        hardware=hardware(),
        patients=arguments.patients,
        steps=arguments.steps,
        samples=arguments.samples,
        repeats=arguments.repeats,
        first_run_seconds=first,
        compilations_after_the_first_run=compiled,
        tool_calls_per_second={name: summary(values) for name, values in rates.items()},
    )
    for name, row in result["tool_calls_per_second"].items():
        print(
            f"{name:10s} {row['median']:8,.0f} tool calls/s ({row['min']:,.0f}-{row['max']:,.0f})"
        )
    print(f"compilations after the first run: {compiled}")
    if arguments.out:
        write_json(arguments.out, result)


def whole_run(
    env: SepsisEnv, forecaster: Forecaster, templates: str, arguments: argparse.Namespace, seed: int
) -> int:
    """Treats all patients from admission; returns the number of answered tool calls."""
    patients = np.arange(arguments.patients)
    keys = patient_keys(jax.random.key(seed), patients)
    pool = EnvPool(env, reset_batch(env, keys, patients), forecaster)
    stays: list[Stay] = []
    asyncio.run(
        treat_all(
            patients.tolist(),
            ScriptedBackend(simulate_and_prescribe),
            pool,
            Prompts(templates),
            DialogueConfig(),
            seeds=[seed] * len(patients),
            concurrency=len(patients),
            finished=stays.append,
        )
    )
    pool.close()
    if not all(stay.status == COMPLETED for stay in stays):
        raise SystemExit("a stay failed")
    return sum(stay.tool_calls for stay in stays)


def count_compilations(run: Callable[[int], int]) -> int:
    """Programs that XLA compiles in a run that was made before."""
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    run(1)
    return len(compiled)


if __name__ == "__main__":
    main()
