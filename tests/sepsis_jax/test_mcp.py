"""The MCP server, asked by the protocol's own client."""

import asyncio
import json
import os
import sys

import numpy as np
import pytest

from sepsis_jax.mcp_server import KEY_VARIABLE, http_app, make_server
from sepsis_jax.pipelines.patient_tools import PatientTools
from sepsis_jax.pipelines.world_model import simulate_patient
from tests.sepsis_jax.command_line import call, refuse
from worldmodel import schema
from worldmodel.episode_files import load_episodes
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import load_world_model

mcp = pytest.importorskip("mcp", reason="needs the extra `mcp`")
TOOLS = {"list_patients", "describe_patient", "simulate", "compare_plans"}
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def tools(first_cohort, first_model):
    return PatientTools.load(first_model, first_cohort, split="all")


@pytest.fixture(scope="module")
def stay(tools):
    """A stay that reaches the start and more."""
    every = tools.list_patients(limit=100)["patients"]
    return next(one["stay_id"] for one in every if one["steps"] > 5)


def asked(server, *calls, **settings):
    """Answers of a server to calls (name, arguments), and what it says of itself."""

    async def ask():
        async with mcp.Client(server, read_timeout_seconds=120, **settings) as client:
            listed = (await client.list_tools()).tools
            answers = [await client.call_tool(*call) for call in calls]
            return client.instructions, listed, answers

    return asyncio.run(ask())


def content(answer):
    """JSON without NaN, the same as text and as structure."""
    assert not answer.is_error, answer.content

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(answer.content[0].text, parse_constant=refuse)
    assert answer.structured_content == found
    return found


def test_a_client_lists_and_calls_the_tools(tools, stay, first_cohort, first_model, tmp_path):
    ask = {"stay_id": stay, "samples": 8, "horizon": 3, "seed": 4}
    plans = ["none=0,0", "more=3,2;1,1"]
    instructions, listed, answers = asked(
        make_server(tools),
        ("list_patients", {"limit": 3}),
        ("describe_patient", {"stay_id": stay, "step": 2}),
        ("simulate", {**ask, "plan": "3,2;1,1"}),
        ("compare_plans", {**ask, "plans": plans}),
    )
    assert "Not for clinical use" in instructions
    assert {tool.name for tool in listed} == TOOLS
    for tool in listed:
        assert tool.annotations.read_only_hint and "Args:" in tool.description
    patients, described, simulated, compared = map(content, answers)

    episodes = load_episodes(first_cohort)
    assert patients["total"] == episodes.num_stays and len(patients["patients"]) == 3
    index = np.flatnonzero(np.asarray(episodes.stay_id) == stay)[0]
    by_name = {one["name"]: one for one in described["features"]}
    assert list(by_name) == list(schema.FEATURE_NAMES)
    meanbp = by_name["meanbp"]
    assert meanbp["unit"] == "mmHg" and len(meanbp["values"]) == 3
    recorded = np.asarray(episodes.dynamic)[index, :3, schema.INDEX["meanbp"]]
    np.testing.assert_allclose(meanbp["values"], recorded, atol=0.51)
    given = [5 * t["vasopressor_level"] + t["fluid_level"] for t in described["treatments"]]
    assert given == np.asarray(episodes.action)[index, :2].tolist()

    # What `sepsis-jax simulate` says of the same plans.
    wanted = simulate_patient(
        load_world_model(first_model), episodes, tmp_path / "out", stay_id=stay, step=2,
        plans=plans, horizon=3, samples=8, seed=4,
    )  # fmt: skip
    for row, want in zip(compared["plans"], wanted.to_dict("records"), strict=True):
        assert row["plan"] == want["plan"]
        for name in ("mortality_mean", "total_reward", "map_below_65"):
            assert row[name] == pytest.approx(want[name], rel=1e-4) and name in compared["units"]
    alone = simulated["outcome"]
    assert alone["mortality_mean"] == pytest.approx(
        compared["plans"][1]["mortality_mean"], rel=1e-4
    )
    assert alone["treatments"][0] == {"vasopressor_level": 3, "fluid_level": 2}
    (series,) = [one for one in simulated["series"] if one["name"] == "meanbp"]
    assert series["unit"] == "mmHg" and series["hour"] == [8, 12, 16, 20]
    assert len(series["mean"]) == 4 and series["q05"][-1] <= series["q95"][-1]


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("describe_patient", {"stay_id": -5}, "is not among"),
        ("describe_patient", {"step": 999}, "step: got 999"),
        ("simulate", {"plan": "9,9"}, "outside 0 to 4"),
        ("simulate", {"plan": "1,1", "samples": 10**9}, "samples: got"),
        ("simulate", {"plan": "1,1", "horizon": 10**9}, "horizon|memory|futures"),
        ("compare_plans", {"plans": []}, "plans: got 0"),
        ("list_patients", {"limit": 0}, "limit: got 0"),
        ("list_patients", {"limit": "many"}, "limit"),
    ],
)
def test_bad_input_is_told_in_words(tools, stay, name, arguments, reason):
    known = {} if name == "list_patients" else {"stay_id": stay}
    _, _, (answer,) = asked(make_server(tools), (name, known | arguments))
    assert answer.is_error
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(answer.content[0].text)


def test_the_command_serves_standard_input_and_output(first_cohort, first_model):
    server = mcp.StdioServerParameters(
        command=sys.executable,
        args=[
            "-m", "sepsis_jax", "mcp", "--model", str(first_model), "--episodes",
            str(first_cohort), "--split", "all",
        ],
        env=dict(os.environ),
    )  # fmt: skip
    _, listed, (answer,) = asked(server, ("list_patients", {}))
    assert {tool.name for tool in listed} == TOOLS
    assert content(answer)["total"] == 60


def test_http_needs_the_key(tools):
    with pytest.raises(InputError, match="at least 16"):
        http_app(tools, "short")
    import httpx2
    import uvicorn
    from mcp.client.streamable_http import streamable_http_client

    server = uvicorn.Server(
        uvicorn.Config(http_app(tools, KEY), host="127.0.0.1", port=0, log_level="error")
    )

    async def ask():
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        url, statuses = f"http://127.0.0.1:{port}/mcp", []
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
            async with httpx2.AsyncClient(headers=headers) as client:
                statuses.append((await client.post(url, json={})).status_code)
        async with httpx2.AsyncClient(headers={"authorization": f"Bearer {KEY}"}) as client:
            transport = streamable_http_client(url, http_client=client)
            async with mcp.Client(transport) as known:
                listed = (await known.list_tools()).tools
                answer = await known.call_tool("list_patients", {"limit": 1})
        server.should_exit = True
        await serving
        return statuses, listed, answer

    statuses, listed, answer = asyncio.run(ask())
    assert statuses == [401, 401, 401]
    assert {tool.name for tool in listed} == TOOLS
    assert content(answer)["total"] == 60


def test_the_command_refuses_to_serve_without_a_key(first_cohort, first_model, monkeypatch, capfd):
    ask = ("mcp", "--model", first_model, "--episodes", first_cohort, "--http", 8123)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    refuse(call(capfd, *ask), "--http", KEY_VARIABLE)
    monkeypatch.setenv(KEY_VARIABLE, "short")
    refuse(call(capfd, *ask), KEY_VARIABLE, "at least 16")
