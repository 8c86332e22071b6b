"""`sepsis-jax mcp`: simulated futures of recorded patients for language models and their hosts."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from sepsis_jax.console import Episodes, Model, console
from worldmodel.errors import InputError

EPILOG = "Example: sepsis-jax mcp --model runs/demo/model --episodes runs/demo/cohort"


def mcp(
    model: Model,
    episodes: Episodes,
    split: Annotated[
        str, typer.Option("--split", help="Patients: train, validation, test or all.")
    ] = "test",
    http: Annotated[
        int | None,
        typer.Option(
            "--http",
            min=1,
            max=65_535,
            help="Port on this machine; default: standard input and output. Needs a key in the "
            "variable SEPSIS_JAX_MCP_KEY.",
        ),
    ] = None,
) -> None:
    """Serve read-only tools of the Model Context Protocol: patients, simulations, plans."""
    from sepsis_jax.mcp_server import HOST, KEY_VARIABLE, serve_http, serve_stdio
    from sepsis_jax.pipelines.patient_tools import PatientTools

    key = os.environ.get(KEY_VARIABLE, "")
    if http is not None and not key:
        raise InputError(f"--http: needs a key in the variable {KEY_VARIABLE}")
    tools = PatientTools.load(model, episodes, split=split)
    if http is None:
        serve_stdio(tools)
        return
    console.print(f"http://{HOST}:{http}/mcp; key: variable {KEY_VARIABLE}", soft_wrap=True)
    serve_http(tools, http, key)
