"""Speed of off-policy evaluation, against a loop over stays in the same run.

    python scripts/bench_ope.py
    python scripts/bench_ope.py --growth 1000 10000 100000 --json benchmarks/ope_cpu.json

The task: 725 stays x 6 policies x all estimators that need no fitting in the run (fitted values,
marginal ratios are given) x 10,000 bootstrap resamples, to a table with BCa intervals, paired
differences, diagnostics and verdicts. The loop does what libraries do: per policy, estimator and
stay in Python, again for every resample; a few resamples of four estimators are timed and scaled
up. Beside it, resampling of values per stay in NumPy, which is wrong for ratio estimators. Warm,
results on the host. `--growth` takes sizes in turns, so that all meet the same load, and gives
processor time beside wall time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sepsis_jax import ope
from worldmodel.resources import usable_cores

STEPS, ACTIONS = 20, 25
LOOP_ESTIMATORS = 4


def make(
    stays: int, policies: int, seed: int = 0
) -> tuple[ope.OPEData, dict[str, np.ndarray], ope.Fitted]:
    """Random stays, policies near the clinician, and fitted ingredients."""
    rng = np.random.default_rng(seed)
    length = rng.integers(4, STEPS + 1, stays)
    alive = np.arange(STEPS) < length[:, None]
    shape = (stays, STEPS, ACTIONS)
    behavior = rng.random(shape, np.float32) + 0.1
    behavior /= behavior.sum(-1, keepdims=True)
    action = (behavior.cumsum(-1) > rng.random((stays, STEPS, 1))).argmax(-1)
    other = rng.random(shape, np.float32)
    other /= other.sum(-1, keepdims=True)
    probs = {f"{k}": (1 - 0.1 * k) * behavior + 0.1 * k * other for k in range(policies)}
    data = ope.OPEData(
        reward=jnp.asarray(np.where(alive, rng.normal(size=alive.shape), 0), jnp.float32),
        alive=jnp.asarray(alive),
        action=jnp.asarray(action, jnp.int32),
        behavior_prob=jnp.asarray(np.take_along_axis(behavior, action[..., None], -1)[..., 0]),
        behavior_probs=jnp.asarray(behavior),
    )
    q = jnp.asarray(rng.normal(size=(policies, *alive.shape)) * alive, jnp.float32)
    values = ope.Values(q, 0.9 * q)
    return data, probs, ope.Fitted(values, values, jnp.ones_like(q))


def loop(data: ope.OPEData, probs: dict[str, np.ndarray], resamples: int) -> tuple[float, float]:
    """Seconds of one pass over all stays and policies: a Python loop, and NumPy on its values.

    The pass computes IS, WIS, PDIS and DR of a resample, stay by stay; a ratio estimator's
    bootstrap repeats it. The NumPy variant resamples values per stay instead, with normalisers
    left as they were, as several libraries do.
    """
    reward, action = np.asarray(data.reward), np.asarray(data.action)
    behavior, length = np.asarray(data.behavior_prob), np.asarray(data.length)
    rng = np.random.default_rng(0)
    rows = np.empty((len(reward), LOOP_ESTIMATORS))
    start = time.perf_counter()
    for _ in range(resamples):
        for target in probs.values():
            for place, i in enumerate(rng.integers(0, len(reward), len(reward))):
                weight, total, per_decision, doubly = 1.0, 0.0, 0.0, 0.0
                for t in range(length[i]):
                    before = weight
                    weight *= target[i, t, action[i, t]] / behavior[i, t]
                    total += reward[i, t]
                    per_decision += weight * reward[i, t]
                    doubly += weight * (reward[i, t] - 0.1) + before * 0.1
                rows[place] = weight, weight * total, per_decision, doubly
    python = (time.perf_counter() - start) / resamples
    start = time.perf_counter()
    for _ in range(resamples):
        for _ in probs:
            for column in range(LOOP_ESTIMATORS):
                np.mean(rng.choice(rows[:, column], len(rows)))
    return python, (time.perf_counter() - start) / resamples


class Seconds(NamedTuple):
    """Time of one call."""

    wall: float
    cpu: float


def grow(sizes: list[int], policies: int, resamples: int, rounds: int) -> dict[int, list[Seconds]]:
    """Times of warm evaluations by size; one call of every size per round."""
    inputs = {stays: make(stays, policies) for stays in sizes}
    found: dict[int, list[Seconds]] = {stays: [] for stays in sizes}
    for seed in range(rounds + 1):
        for stays, (data, probs, fitted) in inputs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            ope.evaluate(
                data, probs, key=jax.random.key(seed), fitted=fitted, n_bootstrap=resamples
            )
            if seed:  # the first call compiles
                found[stays].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
    return found


def timed(run: Callable[[int], object], repeats: int) -> list[float]:
    """Wall seconds of warm repeats."""
    run(0)
    seconds = []
    for repeat in range(1, repeats + 1):
        start = time.perf_counter()
        run(repeat)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--stays", type=int, default=725)
    parser.add_argument("--policies", type=int, default=6)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--growth", type=int, nargs="*", default=[], help="further sizes, stays")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    data, probs, fitted = make(arguments.stays, arguments.policies)

    def evaluate(data, probs, fitted, resamples: int) -> Callable[[int], object]:
        return lambda seed: ope.evaluate(
            data, probs, key=jax.random.key(seed), fitted=fitted, n_bootstrap=resamples
        )

    seconds = timed(evaluate(data, probs, fitted, arguments.resamples), arguments.repeats)
    table = evaluate(data, probs, fitted, 10)(0)
    estimators = table["estimator"].nunique()  # type: ignore[index]
    python, vectorised = loop(data, probs, 5)
    # Assume for the loops the same number of estimators at the cost of their four.
    share = arguments.resamples * estimators / LOOP_ESTIMATORS
    median = float(np.median(seconds))
    result: dict[str, object] = {
        "cores": usable_cores(),
        "load": os.getloadavg()[0],
        "jax": jax.__version__,
        "stays": arguments.stays,
        "policies": arguments.policies,
        "estimators": estimators,
        "resamples": arguments.resamples,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "python_loop_seconds": share * python,
        "python_loop_slower": share * python / median,
        "numpy_resampling_seconds": share * vectorised,
        "numpy_resampling_slower": share * vectorised / median,
    }
    for name, value in result.items():
        print(f"{name:24s} {value:.4g}" if isinstance(value, float) else f"{name:24s} {value}")
    if arguments.growth:
        sizes = sorted(arguments.growth)
        growth = {}
        for stays, calls in grow(sizes, arguments.policies, 1000, arguments.repeats).items():
            each = 1e6 * np.asarray(calls) / stays
            growth[stays] = {
                field: dict(zip(("median", "min", "max"), values, strict=True))
                for field, values in zip(
                    Seconds._fields,
                    np.stack([np.median(each, 0), each.min(0), each.max(0)], 1).tolist(),
                    strict=True,
                )
            }
            print(f"{stays:8d} stays, 1,000 resamples, us per stay: {growth[stays]}")
        result["growth_us_per_stay"] = growth
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
