"""Compile the sharded sweep for real TPU topologies on a machine without a TPU.

    pip install "jax[tpu]"
    python scripts/compile_tpu.py --topologies v5e:4x4 v5e:16x16

libtpu's compiler runs on any x86 Linux host. Each topology gets a mesh of all its chips; the
program is the one that `sepsis-jax sweep` runs, with one task per chip, by XLA's kernels and by the
Pallas kernel of all steps (`worldmodel.simulate.stay_kernel`). Printed per chip: memory
(arguments, outputs, temporaries, code), kernels per call, bytes and FLOPs per branch-step counted
in the optimised program (loops as often as they run), the branch-steps/s that bandwidth and
products allow at most, and what crosses chips, which must be nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # which libtpu misses elsewhere
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxlib
from jax.experimental import topologies

from policy.train.loop.metrics import peak_flops
from sepsis_jax.benchmark.ahead_of_time import CHIPS, Sweep, bytes_planned
from worldmodel.files import write_json
from worldmodel.simulate.sharded import BRANCHES_PER_DEVICE
from worldmodel.simulate.unroll import KERNELS

_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:4x4", "v5e:16x16", "v5p:4x4x4"])
    parser.add_argument("--branches", type=int, default=BRANCHES_PER_DEVICE["tpu"], help="per chip")
    parser.add_argument("--horizon", type=int, default=24, help="steps")
    parser.add_argument("--members", type=int, default=3, help="ensemble size")
    parser.add_argument("--variant", default="recurrent", help="of the world model")
    parser.add_argument("--precision", default="bfloat16", help="of matrix products")
    parser.add_argument(
        "--kernels", nargs="+", default=KERNELS[1:], choices=KERNELS[1:], help="of the rollout"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()

    rows = [
        compiled(name, kernel, arguments)
        for name in arguments.topologies
        for kernel in arguments.kernels
    ]
    print(f"{'topology':12s} {'kernel':6s} {'chips':>5s} {'MB per chip':>12s} {'kernels':>8s} "
          f"{'bytes':>7s} {'FLOPs':>9s} {'M/s by bytes':>12s} {'by FLOPs':>9s} "
          f"{'collectives':>11s} {'compile s':>9s}")  # fmt: skip
    for row in rows:
        print(
            f"{row['topology']:12s} {row['kernel']:6s} {row['chips']:5d} "
            f"{row['bytes_per_chip'] / 1e6:12.1f} {row['kernels_per_call']:8,d} "
            f"{row['bytes_per_branch_step']:7,d} {row['flops_per_branch_step']:9,d} "
            f"{row['branch_steps_by_bandwidth'] / 1e6:12.0f} "
            f"{row['branch_steps_by_products'] / 1e6:9.0f} {row['collectives']:11d} "
            f"{row['compile_seconds']:9.1f}"
        )
    result = {
        "topologies": rows,
        "horizon": arguments.horizon,
        "members": arguments.members,
        "variant": arguments.variant,
        "precision": arguments.precision,
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
    }
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))


def compiled(name: str, kernel: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the compiler says of one topology and one kind of rollout."""
    chips: list[Any] = list(
        topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    )
    sweep = Sweep(
        arguments.variant, arguments.precision, arguments.branches, arguments.horizon,
        arguments.members, kernel,
    )  # fmt: skip
    start = time.perf_counter()
    program = sweep.lower(chips).compile()
    seconds = time.perf_counter() - start
    planned, text = bytes_planned(program), program.as_text() or ""
    kind = chips[0].device_kind
    bandwidth, products = CHIPS[kind].bandwidth, peak_flops(kind)
    assert products is not None
    return {
        "topology": name,
        "kernel": kernel,
        "chips": len(chips),
        "device_kind": kind,
        "branches_per_chip": math.prod(sweep.shape),
        "compile_seconds": round(seconds, 1),
        "bytes_per_chip": planned["peak"],
        "bytes": planned,
        **sweep.counted(program, bandwidth=bandwidth, products=products),
        "collectives": sum(len(re.findall(rf"\b{op}(?:-start)?\(", text)) for op in _COLLECTIVES),
    }


if __name__ == "__main__":
    main()
