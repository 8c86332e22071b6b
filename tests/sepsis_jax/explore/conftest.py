"""A cohort, a recurrent model with drawn parameters, an agent's run, and pages of them."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from starlette.testclient import TestClient

from policy.agent.dialogue import COMPLETED, RELEASE, Decision, Stay, Turn
from policy.agent.records import RECORDS_FILE, to_record
from policy.serving.backend import Reply, ToolCall
from sepsis_jax.explore.explorer import Explorer, Sources
from sepsis_jax.explore.patient import warm
from sepsis_jax.explore.server import create_app
from tests.shared import made_once
from tests.worldmodel.simulate.test_stays import random_world
from worldmodel import load_episodes
from worldmodel.models.checkpoint import save_world_model

KEY, PORT = "a-key-of-the-tests", 8765
ORIGIN = f"http://127.0.0.1:{PORT}"
PATIENT = 4  # of the agent's run, and a stay
MARKUP = '<b title="x">bold</b>'


class Folders(NamedTuple):
    cohort: Path
    model: Path
    run: Path


def written_run(folder):
    """Two decisions: the first simulates before it prescribes."""

    def turn(text, name, arguments, *, opens=False):
        calls = (ToolCall("1", name, json.dumps(arguments)),)
        role = "user" if opens else "tool"
        message = {"role": role, "content": text} | ({} if opens else {"name": "simulation"})
        return Turn((message,), Reply("", calls), seed=0, opens=opens)

    def decision(step, action, turn):
        return Decision(step=step, action=action, reward=0.5, sofa=6.0, meanbp=61.0, lactate=2.5,
                        pao2=90.0, fio2=40.0, previous_vasopressor=0, simulations=1 - step,
                        invalid=0, turn=turn)  # fmt: skip

    stay = Stay(
        patient=PATIENT, status=COMPLETED, outcome=RELEASE, closing=f"The end. {MARKUP}",
        decisions=[decision(0, 6, 1), decision(1, 0, 2)],
        turns=[
            turn("The chart at hour 0.", "simulation", {"actions": [[1, 1]]}, opens=True),
            turn("What the simulator says.", "prescription", {"vasopressor": 1, "iv_fluid": 1}),
            turn("The chart at hour 4.", "prescription", {"vasopressor": 0, "iv_fluid": 0}),
        ],
        invalid=Counter(), tool_calls=3,
    )  # fmt: skip
    folder.mkdir()
    (folder / RECORDS_FILE).write_text(json.dumps(to_record(stay)) + "\n")


@pytest.fixture(scope="session")
def folders(first_cohort, tmp_path_factory, worker_id):
    def make(folder):
        world = random_world(load_episodes(first_cohort), 3, members=2, stay_steps=20)
        # Small risks, so that stays go on, and no plan is like another.
        smaller = jax.tree.map(lambda leaf: 0.7 * leaf, world.outcome_model)
        save_world_model(replace(world, outcome_model=smaller), folder / "model")
        written_run(folder / "run")

    made = made_once("explore", make, tmp_path_factory, worker_id)
    return Folders(first_cohort, made / "model", made / "run")


@pytest.fixture(scope="package")
def explorer(folders):
    sources = Sources(
        folders.model, folders.cohort, ("guideline", "titration"), (str(folders.run),), samples=7
    )
    found = Explorer(sources)
    warm(found)
    return found


@pytest.fixture(scope="package")
def app(explorer):
    return create_app(explorer, KEY, port=PORT)


@pytest.fixture
def stranger(app):
    """A client without the key."""
    return TestClient(app, base_url=ORIGIN, follow_redirects=False)


@pytest.fixture
def client(app):
    return TestClient(app, base_url=ORIGIN, cookies={f"sepsis-jax-explore-{PORT}": KEY})
