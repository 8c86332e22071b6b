"""Compile the sharded sweep for real TPU topologies on a machine without a TPU.

    pip install "jax[tpu]"
    python scripts/compile_tpu.py --topologies v5e:4x4 v5e:16x16

libtpu's compiler runs on any x86 Linux host. Each topology gets a mesh of all its chips; the
program is the one that `sepsis-jax sweep` runs, with one task per chip. Printed per chip: memory
(arguments, outputs, temporaries, code), FLOPs and bytes of one call, as the compiler counts them
(a loop's body once, so FLOPs are counted by hand as well), and what crosses chips, which must be
nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import published_scaler
from worldmodel.simulate.history import start_history
from worldmodel.simulate.sharded import (
    AXIS,
    BRANCHES_PER_DEVICE,
    Task,
    branch_mesh,
    sharded_call,
    task_shape,
)
from worldmodel.simulate.unroll import RolloutConfig
from worldmodel.synthetic import generate

_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
PATIENTS, PLANS = 64, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:4x4", "v5e:16x16"])
    parser.add_argument("--branches", type=int, default=BRANCHES_PER_DEVICE["tpu"], help="per chip")
    parser.add_argument("--horizon", type=int, default=24, help="steps")
    parser.add_argument("--members", type=int, default=3, help="ensemble size")
    parser.add_argument("--precision", default="bfloat16", help="of matrix products")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()

    rows = [compiled(name, arguments) for name in arguments.topologies]
    print(f"{'topology':12s} {'chips':>5s} {'compile s':>10s} {'MB per chip':>12s} "
          f"{'GB moved':>9s} {'branches':>9s} {'collectives':>11s}")  # fmt: skip
    for row in rows:
        print(
            f"{row['topology']:12s} {row['chips']:5d} {row['compile_seconds']:10.1f} "
            f"{row['bytes_per_chip'] / 1e6:12.1f} {row['bytes_accessed'] / 1e9:9.2f} "
            f"{row['branches_per_chip']:9d} {row['collectives']:11d}"
        )
    result = {
        "topologies": rows,
        "horizon": arguments.horizon,
        "members": arguments.members,
        "precision": arguments.precision,
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def compiled(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the compiler says of one topology."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    mesh = branch_mesh(topology.devices)
    # Many samples per patient and plan, as in a sweep; a chip gets one task of one member.
    shape = task_shape(PATIENTS, PLANS, 10**6, 1, branches=arguments.branches)
    call = sharded_call(
        mesh, shape, RolloutConfig(arguments.horizon, precision=arguments.precision)
    )
    start = time.perf_counter()
    program = call.lower(*abstract(mesh, shape, arguments)).compile()
    seconds = time.perf_counter() - start
    memory, cost = program.memory_analysis(), program.cost_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    text = program.as_text()
    return {
        "topology": name,
        "chips": mesh.devices.size,
        "device_kind": mesh.devices.flat[0].device_kind,
        "branches_per_chip": int(np.prod(shape)),
        "compile_seconds": round(seconds, 1),
        "bytes_per_chip": sum(parts.values()),
        "bytes": parts,
        "flops_counted": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "collectives": sum(len(re.findall(rf"\b{op}(?:-start)?\(", text)) for op in _COLLECTIVES),
    }


def abstract(mesh: Any, shape: tuple[int, int, int], arguments: argparse.Namespace) -> tuple:
    """Shapes and shardings of a call's arguments."""
    config = ModelConfig(variant="residual")
    world_model = init_world_model(
        jax.random.key(0), published_scaler(), config, members=arguments.members
    )
    episodes, _ = generate(jax.random.key(1), PATIENTS, keep_latent=False)
    start = start_history(world_model, episodes, 0)
    plans = jnp.zeros((PATIENTS, PLANS, arguments.horizon), jnp.int32)
    chips = mesh.devices.size
    tasks = Task(
        np.zeros((chips, shape[0]), np.int32),
        np.zeros((chips, shape[2]), np.int32),
        np.zeros(chips, np.int32),
    )

    def shaped(tree: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    everywhere = PartitionSpec()
    return (
        shaped(world_model, everywhere),
        None,
        shaped(jax.random.key(0), everywhere),
        shaped(start, everywhere),
        shaped(plans, everywhere),
        shaped(tasks, PartitionSpec(AXIS)),
    )


if __name__ == "__main__":
    main()
