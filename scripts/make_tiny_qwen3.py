"""Makes a tiny Qwen3 folder with a tokenizer, without a network.

    python scripts/make_tiny_qwen3.py --out runs/tiny-qwen3
    python scripts/make_tiny_qwen3.py --out runs/tiny-taught --teach

The weights are random, or, with --teach, have learned to hold the agent's compact dialogue.
transformers, vLLM and `policy.qwen3.load` read it as they read a real one.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from policy.testing import taught_qwen3
from policy.testing.tiny_qwen3 import make_tiny
from worldmodel.errors import InputError

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2},
    "small": {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 2},
    "medium": {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4},
}
PHASES = {"short": taught_qwen3.PHASES, "whole": taught_qwen3.WHOLE_STAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--size", choices=SIZES, help="tiny by default, or smaller with --teach")
    parser.add_argument("--untied", action="store_true", help="output projection of its own")
    parser.add_argument("--rope-theta", type=float, help="1e6 by default, or 1e3 with --teach")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--teach",
        choices=PHASES,
        nargs="?",
        const="short",
        help="stays of three decisions or so (short, the default), or longer ones (whole)",
    )
    arguments = parser.parse_args()
    settings = dict(SIZES[arguments.size]) if arguments.size else {}
    if arguments.teach:
        settings["phases"] = PHASES[arguments.teach]
    else:
        settings = SIZES["tiny"] | settings
    if arguments.rope_theta:
        settings["rope_theta"] = arguments.rope_theta
    try:
        path = (taught_qwen3.taught_tiny if arguments.teach else make_tiny)(
            arguments.out,
            seed=arguments.seed,
            tied=not arguments.untied,
            dtype=arguments.dtype,
            **settings,
        )
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(path)


if __name__ == "__main__":
    main()
