"""`sepsis-jax init` and `sepsis-jax tiny-llm`: what a new project begins with."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import DISCLAIMER, Json, Seed, console, print_json
from sepsis_jax.runs import JsonDict, claimed
from worldmodel.errors import InputError

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2},
    "small": {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 2},
    "medium": {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4},
}


class Size(StrEnum):
    """Sizes of tiny language models."""

    TINY = "tiny"
    SMALL = "small"
    MEDIUM = "medium"


class Dtype(StrEnum):
    """Types in which weights are kept."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; new or empty.")],
    json: Json = False,
) -> None:
    """Write the configurations and templates that ship with the software into a folder."""
    from sepsis_jax.pipelines.configurations import write_configurations

    with claimed(folder):
        written = write_configurations(folder)
    console.print(f"{folder / 'configs'}: {len(written)} files, to read and to change.")
    console.print(f"Next, in {folder}: sepsis-jax demo, or")
    console.print("  sepsis-jax study configs/demo.yaml --dry-run")
    console.print(DISCLAIMER)
    if json:
        print_json({"out": str(folder), "files": written})


def tiny_llm(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    size: Annotated[
        Size | None,
        typer.Option("--size", help="tiny if not given, or smaller still with --teach."),
    ] = None,
    teach: Annotated[
        bool, typer.Option("--teach", help="Train it to hold the agent's dialogue; a minute.")
    ] = False,
    whole_stays: Annotated[
        bool, typer.Option("--whole-stays", help="With --teach: stays of all lengths; minutes.")
    ] = False,
    untied: Annotated[
        bool, typer.Option("--untied", help="An output projection of its own.")
    ] = False,
    rope_theta: Annotated[
        float | None,
        typer.Option("--rope-theta", min=1.0, help="1e6 if not given, or 1e3 with --teach."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the weights.")] = Dtype.BFLOAT16,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Make a tiny Qwen3 folder with a tokenizer, without a network: to try what takes --llm.

    transformers, vLLM and the embedded sampler read it as they read a real one. The weights are
    random, or have learned the form of the agent's compact dialogue (--teach).
    """
    from policy.testing import taught_qwen3
    from policy.testing.tiny_qwen3 import make_tiny

    if whole_stays and not teach:
        raise InputError("--whole-stays: of a model that is taught; add --teach")
    settings: JsonDict = {"seed": seed, "tied": not untied, "dtype": dtype.value}
    if size is not None or not teach:
        settings |= SIZES[size or Size.TINY]
    if rope_theta is not None:
        settings["rope_theta"] = rope_theta
    with claimed(out):
        if teach:
            known = taught_qwen3.WHOLE_STAYS if whole_stays else taught_qwen3.PHASES
            taught_qwen3.taught_tiny(out, phases=known, **settings)
        else:
            make_tiny(out, **settings)
    console.print(str(out))
    if json:
        print_json({"out": str(out)})
