"""Compile the train step of Qwen3-4B for real TPU topologies on a machine without a TPU.

    pip install "jax[tpu]"
    python scripts/compile_train_step.py --json benchmarks/train_step_tpu.json

libtpu's compiler runs on any x86 Linux host. The program is the one that `Learner.update` runs:
cross-entropy of packed rows with rematerialised layers and log-probabilities in chunks, summed
over micro-batches, AdamW, and stochastic rounding where parameters are bfloat16. Parameters are
shapes; nothing is allocated. Printed per chip: memory as the compiler plans it, beside what the
chip has, and the FLOPs of a step counted by hand (the compiler counts a loop's body once), with
the time they take at 40% of the chip's peak. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # which libtpu misses elsewhere
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxlib
from jax.experimental import topologies

from policy.qwen3.config import QWEN3_4B, Qwen3Config
from policy.qwen3.sharding import check_divisible, make_mesh
from policy.train.loop.metrics import flops_per_token, peak_flops
from sepsis_jax.benchmark.ahead_of_time import CHIPS, Update, bytes_planned
from worldmodel.files import write_json

GIB = 2**30
MFU = 0.4


@dataclass(frozen=True)
class Case:
    """One way to train on one topology."""

    topology: str
    fsdp: int
    tensor: int
    param_dtype: str
    data: int = 1
    rows: int = 16  # per micro-batch, over all chips
    accumulate: int = 4
    length: int = 8192  # tokens per row
    remat: str = "full"
    lora: int = 0  # rank of adapters on bfloat16 weights; 0 trains all parameters

    @property
    def update(self) -> Update:
        """What is compiled."""
        return Update(
            self.param_dtype, self.rows, self.accumulate, self.length, self.remat, self.lora
        )


CASES = (
    Case("v5e:4x4", fsdp=16, tensor=1, param_dtype="float32"),
    Case("v5e:4x4", fsdp=16, tensor=1, param_dtype="bfloat16"),
    Case("v5p:4x4x4", fsdp=64, tensor=1, param_dtype="float32", rows=64, accumulate=1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", type=int, nargs="+", help="numbers, from 0; all if not given")
    parser.add_argument("--length", type=int, help="tokens per row, instead of 8192")
    parser.add_argument("--remat", choices=("none", "dots", "full"))
    parser.add_argument("--accumulate", type=int)
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank")
    parser.add_argument("--layers", type=int, default=QWEN3_4B.num_hidden_layers)
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    changed = {
        name: value
        for name in ("length", "remat", "accumulate", "lora")
        if (value := getattr(arguments, name)) is not None
    }
    model = replace(QWEN3_4B, num_hidden_layers=arguments.layers)
    print(f"{'topology':10s} {'data x fsdp x tensor':>20s} {'parameters':>14s} {'tokens':>9s} "
          f"{'arguments':>9s} {'temporary':>9s} {'peak GiB':>9s} {'of':>5s} "
          f"{'s at 40%':>9s} {'compile s':>9s}")  # fmt: skip
    rows = []
    for number, case in enumerate(CASES):
        if arguments.cases is None or number in arguments.cases:
            rows.append(compiled(replace(case, **changed), model))
            print(line(rows[-1]), flush=True)
    result = {
        "model": "Qwen3-4B",
        "layers": model.num_hidden_layers,
        "cases": rows,
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
    }
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))


def line(row: dict[str, Any]) -> str:
    """A case as a line of the table."""
    kind = f"LoRA {row['lora']}" if row["lora"] else row["param_dtype"]
    head = (
        f"{row['topology']:10s} {row['data']:>8d} x {row['fsdp']:>3d} x {row['tensor']:>3d} "
        f"{kind:>14s} {row['tokens_per_step']:>9,d} "
    )
    if "refused" in row:
        return head + f"does not fit: {row['refused']}"
    return head + (
        f"{row['bytes']['arguments'] / GIB:9.2f} {row['bytes']['temporaries'] / GIB:9.2f} "
        f"{row['bytes']['peak'] / GIB:9.2f} {row['bytes']['available'] / GIB:5.0f} "
        f"{row['seconds_at_40_percent']:9.1f} {row['compile_seconds']:9.1f}"
    )


def compiled(case: Case, config: Qwen3Config) -> dict[str, Any]:
    """What the compiler says of one case."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=case.topology)
    mesh = make_mesh(
        data=case.data, fsdp=case.fsdp, tensor=case.tensor, devices=list(topology.devices)
    )
    check_divisible(config, mesh)
    kind = mesh.devices.flat[0].device_kind
    peak = peak_flops(kind)
    assert peak is not None
    tokens = case.rows * case.length * case.accumulate
    flops = tokens * flops_per_token(config, case.length, adapters=bool(case.lora))
    row: dict[str, Any] = {
        **asdict(case),
        "chips": len(topology.devices),
        "device_kind": kind,
        "tokens_per_step": tokens,
        "model_flops_per_step": flops,
        "seconds_at_40_percent": flops / (MFU * peak * len(topology.devices)),
    }
    start = time.perf_counter()
    try:
        program = case.update.lower(config, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        return row | {"refused": _needed(str(error))}
    return row | {
        "compile_seconds": round(time.perf_counter() - start, 1),
        "bytes": {"available": CHIPS[kind].memory, **bytes_planned(program)},
    }


def _needed(message: str) -> str:
    found = re.search(r"Used \S+ of \S+ hbm", message)
    return found.group(0) if found else message.splitlines()[0]


if __name__ == "__main__":
    main()
