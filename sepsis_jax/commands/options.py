"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Episodes = Annotated[
    Path, typer.Option("--episodes", help="Folder of episodes, as `sepsis-jax cohort` writes it.")
]
Model = Annotated[
    Path,
    typer.Option(
        "--model",
        help="World model: a folder that `sepsis-jax world-model train` wrote, or SepsisAgent's "
        "folder of .pt files.",
    ),
]
Config = Annotated[Path | None, typer.Option("--config", help="YAML of settings; see configs/.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
