"""Throughput of the synthetic world, its marginals, and its records beside real ones.

    python scripts/bench_synthetic.py --patients 65536 --repeats 10
    python scripts/bench_synthetic.py --marginals
    python scripts/bench_synthetic.py --records runs/mimic-iv

`--records` reads episodes of `sepsis-jax cohort mimic-iv` and prints, for them and for the world,
what was recorded (share of rows, SD, quantiles, autocorrelation) and how stays pass.

A patient-step is one 4-hour step of one patient: noise, clinician, physiology, observation,
filling, SOFA and reward. Every lane runs to the horizon; `in_stay` counts only the steps before
the patient's stay ended; `per core` divides by the processor time used rather than the wall
time, which tells more on a shared machine. Compilation is not timed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import jax
import numpy as np
import pandas as pd

from worldmodel import Episodes, load_episodes
from worldmodel.resources import usable_cores
from worldmodel.synthetic import (
    Config,
    generate,
    marginals,
    recorded_statistics,
    stay_statistics,
    true_value,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--patients", type=int, default=65536, help="patients per repeat")
    parser.add_argument("--repeats", type=int, default=10, help="timed repeats")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world")
    parser.add_argument("--marginals", action="store_true", help="print the table of marginals")
    parser.add_argument("--records", metavar="DIR", help="episodes to print beside the world's")
    arguments = parser.parse_args()
    key = jax.random.key(arguments.seed)
    if arguments.marginals or arguments.records:
        episodes, _ = generate(key, min(arguments.patients, 16384), keep_latent=False)
    if arguments.records:
        beside(load_episodes(arguments.records), episodes)
        return
    if arguments.marginals:
        table = marginals(episodes)
        print(table.round(2).to_string())
        print(json.dumps({name: row.to_dict() for name, row in table.iterrows()}))
        return

    horizon, count = Config().horizon, arguments.patients
    length = true_value(key, None, count).length
    runs: dict[str, Callable[[], object]] = {
        "simulate": lambda: true_value(key, None, count),
        "generate": lambda: generate(key, count // 4, keep_latent=False),
    }
    shares = {"simulate": count, "generate": count // 4}
    result: dict[str, object] = {
        "device": jax.devices()[0].device_kind,
        "cores": usable_cores(),
        "jax": jax.__version__,
    }
    columns = ("median", "min", "max", "in stay", "per core")
    print(f"{'':10s} " + " ".join(f"{c:>10s}" for c in columns) + "  patient-steps/s")
    for name, run in runs.items():
        run()
        rates, busy = [], time.process_time()
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            jax.block_until_ready(run())
            rates.append(shares[name] * horizon / (time.perf_counter() - start))
        median, low, high = float(np.median(rates)), min(rates), max(rates)
        busy = time.process_time() - busy
        row = {
            "median": median,
            "min": low,
            "max": high,
            "in_stay": median * length / horizon,
            "per_core": arguments.repeats * shares[name] * horizon / busy,
        }
        print(f"{name:10s} " + " ".join(f"{value:10,.0f}" for value in row.values()))
        result[name] = row
    print(json.dumps(result))


def beside(records: Episodes, world: Episodes) -> None:
    """Prints the statistics of the records beside those of the world."""
    both = {"records": records, "world": world}
    table = pd.concat({k: recorded_statistics(e) for k, e in both.items()}, axis=1)
    order = [(k, name) for name in table["world"].columns for k in both]
    table = table[order].swaplevel(axis=1)
    stays = pd.DataFrame({k: stay_statistics(e) for k, e in both.items()})
    print(table.round(2).to_string())
    print(stays.round(2).to_string())
    print(
        json.dumps(
            {
                k: {
                    "recorded": table.xs(k, axis=1, level=1).T.to_dict(),
                    "stays": stays[k].to_dict(),
                }
                for k in both
            }
        )
    )


if __name__ == "__main__":
    main()
