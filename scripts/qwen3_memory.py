"""Bytes per device of training a Qwen3, from the shardings that training would use.

    python scripts/qwen3_memory.py --size 4b

Nothing is allocated: parameters, gradients and AdamW's moments are shapes on simulated devices.
`--length T` also compiles the gradient for rows of T tokens, one per device along fsdp, for
simulated CPU devices, and tells its temporary memory; an upper estimate, since CPUs keep float32
copies of bfloat16 operands. `--lora RANK` trains adapters on bfloat16
weights instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

MESHES = "8x1,4x2,16x1,8x2,4x4,32x1"
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("0.6b", "1.7b", "4b", "8b"), default="4b")
    parser.add_argument("--config", help="folder with a config.json, instead of --size")
    parser.add_argument("--meshes", default=MESHES, help="fsdp x tensor, comma-separated")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank")
    parser.add_argument("--length", type=int, metavar="T", help="compile the gradient as well")
    arguments = parser.parse_args()
    meshes = [tuple(map(int, mesh.split("x"))) for mesh in arguments.meshes.split(",")]
    # Before JAX is imported, which reads them then.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(max(fsdp * tensor for fsdp, tensor in meshes))
    from worldmodel.errors import InputError

    try:
        report(arguments, meshes)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def report(arguments: Any, meshes: list[tuple[int, ...]]) -> None:
    """Prints one line per mesh."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from policy.qwen3.config import Qwen3Config, load_config
    from policy.qwen3.logprobs import token_logprobs
    from policy.qwen3.lora import add_adapters
    from policy.qwen3.model import Qwen3
    from policy.qwen3.sharding import (
        abstract,
        batch_sharding,
        bytes_per_device,
        check_divisible,
        make_mesh,
    )

    sizes = {  # hidden, MLP, layers, heads, tied
        "0.6b": (1024, 3072, 28, 16, True),
        "1.7b": (2048, 6144, 28, 16, True),
        "4b": (2560, 9728, 36, 32, True),
        "8b": (4096, 12288, 36, 32, False),
    }
    if arguments.config:
        config = load_config(arguments.config)
    else:
        hidden, inner, layers, heads, tied = sizes[arguments.size]
        config = Qwen3Config(
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            rope_theta=1e6,
            tie_word_embeddings=tied,
        )
    frozen_dtype = jnp.bfloat16 if arguments.lora else jnp.float32

    def model() -> Qwen3:
        base = Qwen3(config, dtype=jnp.bfloat16, param_dtype=frozen_dtype, rngs=nnx.Rngs(0))
        if not arguments.lora:
            return base
        return add_adapters(base, rank=arguments.lora, alpha=32.0, rngs=nnx.Rngs(1))

    trained_kind = nnx.LoRAParam if arguments.lora else nnx.Param

    def params() -> Any:
        return nnx.state(model(), nnx.Param)

    def trained() -> Any:
        return nnx.state(model(), trained_kind)

    graphdef = nnx.graphdef(nnx.eval_shape(model))

    def loss(trained: Any, params: Any, ids: jax.Array) -> jax.Array:
        merged = nnx.merge(graphdef, nnx.merge_state(params, trained))
        return token_logprobs(merged, ids, remat="full").logprob.mean()

    def temporary(mesh: Any) -> int:
        """Bytes on each device while the gradient is computed, beside what goes in and out."""
        ids = jax.ShapeDtypeStruct(
            (mesh.shape["fsdp"], arguments.length), jnp.int32, sharding=batch_sharding(mesh)
        )
        tuned = abstract(trained, mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, tuned)
        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(loss), out_shardings=places)
            compiled = step.lower(tuned, abstract(params, mesh), ids).compile()
        found = compiled.memory_analysis()
        assert found is not None  # CPUs always tell
        return found.temp_size_in_bytes

    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(params)))
    tuned = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(trained)))
    titles = ["fsdp x tensor", "parameters", "gradients", "AdamW"]
    titles += [f"temporary, {arguments.length} tokens"] if arguments.length else []
    print(f"{count:,} parameters, {tuned:,} trained in float32; GiB per device")
    print("| " + " | ".join([*titles, "sum"]) + " |")
    print("| --- " * (len(titles) + 1) + "|")
    for fsdp, tensor in meshes:
        mesh = make_mesh(fsdp=fsdp, tensor=tensor)
        check_divisible(config, mesh)
        parts = [
            bytes_per_device(abstract(make, mesh)) / GIB
            for make in (params, trained, lambda: optax.adamw(1e-5).init(trained()))
        ]
        parts += [temporary(mesh) / GIB] if arguments.length else []
        columns = " | ".join(f"{part:.2f}" for part in (*parts, sum(parts)))
        print(f"| {fsdp} x {tensor} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
