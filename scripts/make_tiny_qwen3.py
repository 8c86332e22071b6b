"""Makes a tiny random Qwen3 folder with a tokenizer, without a network.

    python scripts/make_tiny_qwen3.py --out runs/tiny-qwen3

transformers, vLLM and `policy.qwen3.load` read it as they read a real one.
"""

from __future__ import annotations

import argparse
import sys

from policy.qwen3.tiny import make_tiny
from worldmodel.errors import InputError

SIZES = {
    "tiny": {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2},
    "small": {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 2},
    "medium": {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--untied", action="store_true", help="output projection of its own")
    parser.add_argument("--rope-theta", type=float, default=1e6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        path = make_tiny(
            arguments.out,
            seed=arguments.seed,
            tied=not arguments.untied,
            rope_theta=arguments.rope_theta,
            dtype=arguments.dtype,
            **SIZES[arguments.size],
        )
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(path)


if __name__ == "__main__":
    main()
