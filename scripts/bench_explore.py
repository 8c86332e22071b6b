"""How soon the pages of `sepsis-jax explore` answer, over HTTP on this machine.

    python scripts/bench_explore.py --model runs/demo/model --episodes runs/demo/cohort

Asks for what the browser asks for: the inner part of a patient's page, after another cell of the
grid (the 25 plans are there already), another plan step by step (25 new plans), another hour, and
another patient. Prints milliseconds of the whole answer, and of processor time of this process.
Run it on cores that nothing else uses.
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sepsis_jax.explore.explorer import Explorer, Sources
from sepsis_jax.explore.patient import warm
from sepsis_jax.explore.server import FRAGMENT, HOST, bound_socket, create_app, new_key, serve
from worldmodel import schema

Question = Callable[[int], str]


def questions(stays: list[int]) -> dict[str, Question]:
    """Addresses by what changes; the i-th one of each is new to the server."""

    def action(i: int) -> str:
        return "{},{}".format(*schema.action_levels(i % schema.NUM_ACTIONS))

    return {
        "another cell of the grid": lambda i: f"stay={stays[0]}&step=0&plan={action(i)}",
        "another plan, step by step": lambda i: (
            f"stay={stays[0]}&step=0&plan={action(i)};{action(i // 25 + 7)};1,1&edit=2"
        ),
        "another hour": lambda i: f"stay={stays[1 + i % 8]}&step={1 + i // 8}&plan=2,1",
        "another patient": lambda i: f"stay={stays[10 + i]}&step=0&plan=2,1",
    }


def main() -> None:
    """Serves, asks and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--episodes", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    explorer = Explorer(
        Sources(options.model, options.episodes, ("guideline", "titration"), (), options.samples)
    )
    warm(explorer)
    listening = bound_socket(0)
    port = int(listening.getsockname()[1])
    key = new_key()
    app = create_app(explorer, key, port=port)
    threading.Thread(target=serve, args=(app, listening), daemon=True).start()
    stays = [stay for stay, row in explorer.rows.items() if explorer.length[row] > 8]
    headers = {"Cookie": f"sepsis-jax-explore-{port}={key}", FRAGMENT: "1"}
    connection = http.client.HTTPConnection(HOST, port)
    found: dict[str, dict[str, float]] = {}
    for name, address in questions(stays).items():
        wall, busy = [], []
        for i in range(options.rounds + 1):
            begin, begun = time.perf_counter(), time.process_time()
            connection.request("GET", f"/patient?{address(i)}", headers=headers)
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read()
            wall.append(1e3 * (time.perf_counter() - begin))
            busy.append(1e3 * (time.process_time() - begun))
        median, high = np.quantile(wall[1:], (0.5, 0.95)).tolist()
        found[name] = {
            "median_ms": round(median, 1), "p95_ms": round(high, 1),
            "longest_ms": round(max(wall[1:]), 1),
            "processor_ms": round(float(np.median(busy[1:])), 1),
        }  # fmt: skip
        print(f"{name:28}", json.dumps(found[name]), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps({"samples": explorer.samples, "answers": found}) + "\n")


if __name__ == "__main__":
    main()
