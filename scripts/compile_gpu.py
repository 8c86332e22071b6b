"""Compile rollouts, Qwen3-4B's train step and sampler, and OPE for H100 and H200 without a GPU.

    pip install "jax[cuda13]"
    python scripts/compile_gpu.py --json benchmarks/compile_gpu.json
    python scripts/compile_gpu.py --cards h100 --variants recurrent --no-update

XLA compiles for a card by its figures; of the recurrent variant also the Pallas kernel of all steps
(`worldmodel.simulate.stay_kernel`). Printed for rollouts: memory beside what the card has,
kernels per call, bytes and FLOPs per branch-step counted in the optimised program (operands and
results of every kernel, loops as often as they run), and the branch-steps/s that bandwidth and
products allow at most. Nothing is measured. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxlib

from policy.qwen3.config import QWEN3_4B
from policy.qwen3.sharding import make_mesh
from policy.train.loop.metrics import flops_per_token
from sepsis_jax.benchmark.ahead_of_time import (
    CARDS,
    Bootstrap,
    Sampling,
    Sweep,
    Update,
    bytes_planned,
    gpu,
)
from sepsis_jax.benchmark.programs import traffic
from worldmodel.files import write_json
from worldmodel.models.clinical_model import VARIANTS
from worldmodel.simulate.sharded import BRANCHES_PER_DEVICE
from worldmodel.simulate.unroll import KERNELS

GIB = 2**30
# names of precisions as users know them, and those of `RolloutConfig`
PRECISIONS = {"float32": "highest", "tensorfloat32": "default", "bfloat16": "bfloat16"}
MFU = 0.4
UPDATES = (
    Update("bfloat16", rows=1, accumulate=16),  # configs/train_qwen3_4b_1xh200.yaml
    Update("bfloat16", rows=1, accumulate=16, lora=32),
)
SAMPLING = Sampling(rows=64, prompt=2048, new=1024)  # of the same configuration
BOOTSTRAP = Bootstrap(stays=10_000, steps=20, policies=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=list(CARDS))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument(
        "--kernels", nargs="+", default=KERNELS[1:], choices=KERNELS[1:],
        help="of the recurrent variant but in float32; the others have one",
    )  # fmt: skip
    parser.add_argument("--branches", type=int, default=BRANCHES_PER_DEVICE["gpu"])
    parser.add_argument("--horizon", type=int, default=24, help="steps")
    parser.add_argument("--no-update", action="store_true", help="rollouts alone")
    parser.add_argument("--length", type=int, default=8192, help="tokens per row of the update")
    parser.add_argument("--layers", type=int, default=QWEN3_4B.num_hidden_layers)
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()

    print(f"{'card':5s} {'variant':10s} {'precision':13s} {'kernel':6s} {'memory GiB':>10s} "
          f"{'kernels':>8s} "
          f"{'bytes':>7s} {'FLOPs':>9s} {'M/s by bytes':>12s} {'by FLOPs':>9s} {'compile s':>9s}"
    )  # fmt: skip
    rollouts = []
    for variant, precision, kernel in product(
        arguments.variants, arguments.precisions, arguments.kernels
    ):
        if kernel != "xla" and (variant != "recurrent" or precision == "float32"):
            continue
        for card in arguments.cards:
            rollouts.append(rollout(card, variant, precision, kernel, arguments))
            print(line(rollouts[-1]), flush=True)
    updates = []
    for number, case in enumerate(() if arguments.no_update else UPDATES):
        for card in arguments.cards:
            updates.append(trained(card, replace(case, length=arguments.length), arguments.layers))
            row = updates[-1]
            if number == 0 and card == arguments.cards[0]:
                print(f"{'card':5s} {'trained':>14s} {'arguments':>9s} {'temporary':>9s} "
                      f"{'peak GiB':>9s} {'of':>5s} {'s at 40%':>9s} {'compile s':>9s}"
                )  # fmt: skip
            kind = f"LoRA {case.lora}" if case.lora else f"all, {case.param_dtype}"
            planned = row["bytes"]
            print(
                f"{card:5s} {kind:>14s} {planned['arguments'] / GIB:9.2f} "
                f"{planned['temporaries'] / GIB:9.2f} {planned['peak'] / GIB:9.2f} "
                f"{CARDS[card].memory / GIB:5.0f} {row['seconds_at_40_percent']:9.1f} "
                f"{row['compile_seconds']:9.1f}",
                flush=True,
            )
    others = []
    for card in () if arguments.no_update else arguments.cards:
        for row in other(card, arguments.layers):
            others.append(row)
            print(
                f"{card:5s} {row['program']:>26s}: {row['kernels']:7,d} kernels, "
                f"{row['bytes_moved'] / GIB:9.1f} GiB moved, at least "
                f"{row['seconds_by_bandwidth']:6.2f} s; peak "
                f"{row['bytes']['peak'] / GIB:6.2f} of {CARDS[card].memory / GIB:.0f} GiB",
                flush=True,
            )
    result = {
        "rollouts": rollouts,
        "updates": updates,
        "others": others,
        "layers": arguments.layers,
        "horizon": arguments.horizon,
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
    }
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))


def rollout(
    card: str, variant: str, precision: str, kernel: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What the compiler says of the sweep's program, and what its kernels move."""
    sweep = Sweep(
        variant, PRECISIONS[precision], arguments.branches, arguments.horizon, kernel=kernel
    )
    start = time.perf_counter()
    program = sweep.lower(gpu(card)).compile()
    seconds = time.perf_counter() - start
    bandwidth, products = CARDS[card].bandwidth, getattr(CARDS[card], precision)
    return {
        "card": card,
        "variant": variant,
        "precision": precision,
        "kernel": kernel,
        "branches": math.prod(sweep.shape),
        "bytes": bytes_planned(program),
        **sweep.counted(program, bandwidth=bandwidth, products=products),
        "compile_seconds": round(seconds, 1),
    }


def line(row: dict[str, Any]) -> str:
    """A rollout as a line of the table."""
    return (
        f"{row['card']:5s} {row['variant']:10s} {row['precision']:13s} {row['kernel']:6s} "
        f"{row['bytes']['peak'] / GIB:10.2f} {row['kernels_per_call']:8,d} "
        f"{row['bytes_per_branch_step']:7,d} {row['flops_per_branch_step']:9,d} "
        f"{row['branch_steps_by_bandwidth'] / 1e6:12.0f} "
        f"{row['branch_steps_by_products'] / 1e6:9.0f} {row['compile_seconds']:9.1f}"
    )


def trained(card: str, case: Update, layers: int) -> dict[str, Any]:
    """What the compiler says of an update of Qwen3-4B on one card."""
    model = replace(QWEN3_4B, num_hidden_layers=layers)
    tokens = case.rows * case.length * case.accumulate
    flops = tokens * flops_per_token(model, case.length, adapters=bool(case.lora))
    start = time.perf_counter()
    program = case.lower(model, make_mesh(devices=gpu(card))).compile()
    return {
        "card": card,
        **asdict(case),
        "tokens_per_step": tokens,
        "model_flops_per_step": flops,
        "seconds_at_40_percent": flops / (MFU * CARDS[card].bfloat16),
        "bytes": bytes_planned(program),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def other(card: str, layers: int) -> Iterator[dict[str, Any]]:
    """What the compiler says of the sampler with Qwen3-4B and of off-policy evaluation."""
    (device,) = gpu(card)
    model = replace(QWEN3_4B, num_hidden_layers=layers)
    lowered = SAMPLING.lower(model, make_mesh(devices=[device]))
    cases: list[tuple[str, jax.stages.Lowered, dict[str, Any]]] = [
        *((f"sampler, {name}", one, asdict(SAMPLING)) for name, one in lowered.items()),
        ("bootstrap of estimates", BOOTSTRAP.lower(device), asdict(BOOTSTRAP)),
    ]
    for name, program, sizes in cases:
        start = time.perf_counter()
        compiled = program.compile()
        moved = traffic(compiled.as_text() or "")
        yield {
            "card": card,
            "program": name,
            **sizes,
            "bytes": bytes_planned(compiled),
            "kernels": moved.kernels,
            "bytes_moved": moved.bytes,
            "seconds_by_bandwidth": moved.bytes / CARDS[card].bandwidth,
            "compile_seconds": round(time.perf_counter() - start, 1),
        }


if __name__ == "__main__":
    main()
