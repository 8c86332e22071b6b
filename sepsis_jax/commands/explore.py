"""`sepsis-jax explore`: a local page to look into one patient."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sepsis_jax.console import (
    DISCLAIMER,
    Episodes,
    Json,
    Model,
    Seed,
    console,
    errors,
    phases,
    print_json,
)
from worldmodel.configuration import LARGEST

PORT = 8765


def explore(
    model: Model,
    episodes: Episodes,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="Folder of a policy, NAME=FOLDER, or random, none, max, guideline, titration: "
            "what it would give is shown. Repeat for more; guideline and titration by default.",
        ),
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option("--run", help="Folder of an agent's run, to read its dialogues; repeat."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, max=LARGEST, help="Futures per plan.")
    ] = 200,
    seed: Seed = 0,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65_535, help="On 127.0.0.1; 0 for a free one.")
    ] = PORT,
    json: Json = False,
) -> None:
    """Look into one patient in the browser: history, futures under any plan, policies, dialogues.

    The page is served to this machine alone, with a key, until Ctrl-C. The key is new at every
    start, or that of the variable SEPSIS_JAX_EXPLORE_KEY.
    """
    from sepsis_jax.explore.server import (
        HOST,
        KEY_VARIABLE,
        bound_socket,
        check_installed,
        create_app,
        new_key,
        serve,
    )

    check_installed()
    listening = bound_socket(port)
    try:
        from sepsis_jax.explore.explorer import Explorer, Sources
        from sepsis_jax.explore.patient import warm

        policies = ("guideline", "titration") if policy is None else tuple(policy)
        sources = Sources(model, episodes, policies, tuple(map(str, run or ())), samples, seed)
        with phases("explore") as progress:
            progress("reading", 0.0)
            explorer = Explorer(sources)
            warm(explorer, progress)
        given = os.environ.get(KEY_VARIABLE)
        key = given or new_key()
        port = int(listening.getsockname()[1])
        page = f"http://{HOST}:{port}/"
        address = page if given else f"{page}?key={key}"
        hint = f"; key: variable {KEY_VARIABLE}" if given else ""
        console.print(f"{address}{hint}", soft_wrap=True)
        console.print(f"Ctrl-C stops.  {DISCLAIMER}", soft_wrap=True)
        if json:
            print_json({"url": page, "address": address, "port": port})
        serve(create_app(explorer, key, port=port), listening)
    except KeyboardInterrupt:
        errors.print("sepsis-jax: the server is stopped")
    finally:
        listening.close()
