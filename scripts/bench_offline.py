"""Seconds to train every method of offline reinforcement learning, and what it is worth.

    python scripts/bench_offline.py --json benchmarks/offline_cpu.json

Stays of the synthetic world, their training split as transitions; then each method with its
default settings and several seeds, once, compilation included: wall seconds, and the processor
seconds of all cores, which other jobs on the machine change less. The value is the true one of
the greedy policy (mean over seeds' scores) on fresh patients, beside the clinician's.
With `--side-by-side` the seeds are also trained as one batched program, as an accelerator does.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import jax
import optax
from bench_env import processor

from policy.offline import training
from policy.offline.algorithms import NAMES, OfflineConfig
from policy.offline.data import transitions
from worldmodel import load_episodes
from worldmodel.resources import usable_cores
from worldmodel.scaling import Scaler
from worldmodel.synthetic import Config, generate, true_value

_TEST_WORLD = 4242


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--episodes", type=Path, help="folder of stays; default: made on the fly")
    parser.add_argument("--patients", type=int, default=20_000, help="stays made on the fly")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=OfflineConfig.updates)
    parser.add_argument("--values", type=int, default=2000, help="patients of the true values")
    parser.add_argument("--side-by-side", action="store_true", help="time the batched program too")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()

    if arguments.episodes:
        episodes = load_episodes(arguments.episodes)
    else:
        episodes, _ = generate(jax.random.key(0), arguments.patients, keep_latent=False)
    scaler = Scaler.fit(episodes)
    settings = OfflineConfig(seeds=arguments.seeds, updates=arguments.updates)
    start = time.perf_counter()
    data = jax.block_until_ready(
        transitions(episodes.of_split("train"), scaler, past=settings.past)
    )
    print(f"{data.num_rows} transitions in {time.perf_counter() - start:.1f} s", flush=True)

    world = {"num_patients": arguments.values, "config": Config(past=settings.past)}
    clinician = true_value(jax.random.key(_TEST_WORLD), None, **world)
    heads = ("seconds", "of cores", "batched")
    print(f"{'':12s} " + " ".join(f"{head:>8s}" for head in heads), end="")
    print(f" {'value':>7s} {'SE':>5s} {'mortality':>9s}")
    print(f"{'clinician':39s} {clinician.value:7.2f} {clinician.value_se:5.2f}", end="")
    print(f" {clinician.mortality:9.3f}", flush=True)
    rows = {}
    load = {"before": os.getloadavg()[0]}
    for method in arguments.methods:
        config = replace(settings, algorithm=method)
        start, used = time.perf_counter(), time.process_time()
        learned = training.train_offline(data, scaler, config)
        jax.block_until_ready(learned.policy)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        batched = None
        if arguments.side_by_side:
            start = time.perf_counter()
            keys = training.seed_keys(config)
            jax.block_until_ready(training.train_all(keys, data, config=config, report=None))
            batched = round(time.perf_counter() - start, 1)
        found = true_value(jax.random.key(_TEST_WORLD), learned.policy, **world)
        rows[method] = {
            "seconds": round(seconds, 1),
            "processor_seconds": round(used, 1),
            "seconds_batched": batched,
            "value": round(found.value, 2),
            "value_se": round(found.value_se, 2),
            "mortality": round(found.mortality, 3),
        }
        print(
            f"{method:12s} {seconds:8.1f} {used:8.1f} {batched or '':>8} {found.value:7.2f} "
            f"{found.value_se:5.2f} {found.mortality:9.3f}",
            flush=True,
        )
    load["after"] = os.getloadavg()[0]
    result = {
        "methods": rows,
        "clinician": {"value": round(clinician.value, 2), "mortality": clinician.mortality},
        "seeds": arguments.seeds,
        "updates": arguments.updates,
        "batch_size": settings.batch_size,
        "transitions": data.num_rows,
        "patients_of_values": arguments.values,
        "load_average": load,  # of the last minute; more than the cores: others slowed this down
        "hardware": {
            "device": jax.devices()[0].device_kind,
            "processor": processor(),
            "cores": usable_cores(),
        },
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
        },
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
