"""Speed of rollouts by variant of the world model: equal patients, plans and samples, one run.

    python scripts/bench_variants.py --out benchmarks/variants.json

Weights are untrained, which does not change the work. Figures are branch-steps per second, median
and range over repeats, and their ratio to the residual variant. Variants that read windows gain
from short horizons: rows that were recorded, and the first simulated one, are read once for all
samples of a patient.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from sepsis_jax.benchmark.hardware import hardware
from worldmodel import schema
from worldmodel.files import write_json
from worldmodel.models.clinical_model import VARIANTS, ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import published_scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import rollout
from worldmodel.synthetic import generate

_STEP = 2


def branch_steps_per_second(
    variant: str, *, patients: int, samples: int, horizon: int, repeats: int
) -> list[float]:
    """Speed of each repeat after a first one that compiles."""
    episodes, truth = generate(jax.random.key(0), 4 * patients, keep_latent=False)
    reach = np.flatnonzero(np.asarray(episodes.length) > _STEP)[:patients]
    world_model = init_world_model(
        jax.random.key(1),
        published_scaler(),
        ModelConfig(variant=variant),
        stay_steps=truth.config.horizon,
    )
    start = start_history(world_model, episodes.select(reach), _STEP)
    plans = np.tile(np.arange(schema.NUM_ACTIONS)[:, None], (1, horizon))
    speeds = []
    for repeat in range(repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(
            rollout(world_model, jax.random.key(repeat), start, plans, samples=samples)
        )
        seconds = time.perf_counter() - begin
        speeds.append(len(reach) * len(plans) * samples * horizon / seconds)
    return speeds[1:]


def main() -> None:
    """Compares the variants at every horizon, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="JSON to write")
    parser.add_argument("--patients", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--horizon", type=int, nargs="+", default=[6, 12, 24], help="steps")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    shape = {name: getattr(arguments, name) for name in ("patients", "samples")}
    found = {
        f"{horizon} steps": compare(horizon, arguments.repeats, shape)
        for horizon in arguments.horizon
    }
    if arguments.out is not None:
        write_json(arguments.out, {"hardware": hardware(), "shape": shape, "speed": found})


def compare(horizon: int, repeats: int, shape: dict[str, int]) -> dict[str, dict[str, float]]:
    """Measures every variant in turn, twice, and prints the figures."""
    speeds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(2):
        for variant in VARIANTS:
            speeds[variant] += branch_steps_per_second(
                variant, **shape, horizon=horizon, repeats=repeats
            )
    base = float(np.median(speeds["residual"]))
    found = {
        variant: {
            "median": float(np.median(values)),
            "least": min(values),
            "most": max(values),
            "times_residual": float(np.median(values)) / base,
        }
        for variant, values in speeds.items()
    }
    for variant, row in found.items():
        print(
            f"{horizon:3d} steps, {variant:10s} {row['median']:12,.0f} branch-steps/s "
            f"({row['least']:,.0f} to {row['most']:,.0f}), {row['times_residual']:.2f} x residual",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
