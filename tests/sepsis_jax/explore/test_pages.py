"""The pages and their server, without a browser."""

import contextlib
import html
import io
import json
import re
import socket
from dataclasses import replace
from importlib.resources import files

import jax
import numpy as np
import pandas as pd
import pytest
from starlette.testclient import TestClient

from policy import action_probs, make
from sepsis_jax.commands import explore as command
from sepsis_jax.explore import patient, server
from sepsis_jax.explore.address import PatientAddress, plan_text, read_patient_address, read_plan
from sepsis_jax.explore.charts import FAN_VALUES, fan_charts, history_charts, plan_styles
from sepsis_jax.explore.dialogues import turns_of
from sepsis_jax.explore.explorer import VALUES, Explorer, Sources, plan_variants
from sepsis_jax.explore.patients import stay_table
from sepsis_jax.report.figures import COLORS, PLAN_COLORS
from tests.sepsis_jax.command_line import call, refuse
from tests.sepsis_jax.explore.conftest import KEY, MARKUP, ORIGIN, PATIENT, PORT
from worldmodel import rollout, schema, start_history
from worldmodel.errors import InputError
from worldmodel.simulate.plans import CLINICIAN

COOKIE = f"sepsis-jax-explore-{PORT}"


def long_stay(explorer, steps=9):
    return next(stay for stay, row in explorer.rows.items() if explorer.length[row] >= steps)


def address_of(text, horizon=6):
    query = {}
    for name, value in re.findall(r"(\w+)=([^&]*)", text):
        query.setdefault(name, []).append(value)
    return read_patient_address(query, horizon=horizon)


def code_of(answer):
    """The Python that a page prints."""
    return html.unescape(re.search(r'<code id="code-text">(.*?)</code>', answer.text, re.S)[1])


def ran(code):
    """The names that the code leaves, and what it prints."""
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "page", "exec"), names)
    return names, printed.getvalue()


# Addresses


def test_addresses_hold_all_that_a_page_shows():
    address = PatientAddress(
        7, 3, (6, 6, 0, 0, 24, 24), edit=2, beside=("2,1", CLINICIAN), grid="reward",
        history="labs", truth=False,
    )  # fmt: skip
    assert address_of(address.link()) == address
    assert address_of(address.link(plan=(1,) * 6)) == replace(address, plan=(1,) * 6)
    assert address_of(address.link(beside=())).beside == ()
    assert address_of(address.edit_link(None)).edit is None
    assert address_of("stay=7").beside == (CLINICIAN,)


@pytest.mark.parametrize("plan", [(0,) * 6, (6, 6, 0, 0, 24, 24), (1, 2, 3, 4, 5, 6)])
def test_plans_as_text_are_read_back(plan):
    assert read_plan(plan_text(plan), 6) == plan
    assert plan_text((7,) * 6) == "1,2"


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("stay=x", "stay"), ("stay=-1", "stay"), ("stay=²", "stay"), ("stay=1&plan=5,0", "plan"),
        ("stay=1&plan=1,1;1,1;1,1;1,1;1,1;1,1;1,1", "plan"), ("stay=1&edit=6", "edit"),
        ("stay=1&grid=x", "grid"), ("stay=1&with=0,0&with=1,1&with=2,2&with=3,3", "with"),
        ("stay=1&history=all", "history"), ("stay=1&truth=2", "truth"),
    ],
)  # fmt: skip
def test_malformed_addresses_are_refused_by_name(query, word, client):
    with pytest.raises(InputError, match=word):
        address_of(query)
    answer = client.get(f"/patient?{query}")
    assert answer.status_code == 400 and word in answer.text


def test_unknown_stays_and_rows_are_refused(client, explorer):
    assert "stay 999999 is not among" in client.get("/patient?stay=999999").text
    answer = client.get(f"/patient?stay={long_stay(explorer)}&step=20")
    assert answer.status_code == 400 and "has rows 0 to" in answer.text


def test_what_an_address_holds_is_shown_as_text(client):
    answer = client.get("/patient?stay=1&plan=<script>alert(1)</script>")
    assert answer.status_code == 400 and "<script>alert" not in answer.text
    assert "&lt;script&gt;alert" in answer.text


# Futures


def test_the_grid_sets_one_step_or_all():
    plan = np.array([1, 2, 3])
    all_steps, second = plan_variants(plan, None), plan_variants(plan, 1)
    np.testing.assert_array_equal(all_steps, np.repeat(np.arange(25)[:, None], 3, axis=1))
    np.testing.assert_array_equal(second[:, 1], np.arange(25))
    np.testing.assert_array_equal(second[:, [0, 2]], np.tile([1, 3], (25, 1)))


def test_futures_are_those_of_a_rollout_of_the_plans_alone(explorer):
    stay = long_stay(explorer)
    address = PatientAddress(stay, 2, (6, 6, 1, 1, 1, 0), edit=3, beside=("0,0",))
    found = explorer.futures(address)
    plans = np.array([[6, 6, 1, 17, 1, 0], list(address.plan), [0] * 6])
    alone = rollout(
        explorer.world_model, jax.random.key(0),
        start_history(explorer.world_model, explorer.one(stay), 2), plans,
        samples=explorer.samples, features=VALUES,
    )  # fmt: skip
    mortality = np.asarray(alone.mortality[0], np.float64)
    reward = np.asarray(alone.total_reward[0], np.float64)
    assert found.grid["mortality_mean"][17] == pytest.approx(mortality[0].mean(), abs=1e-5)
    np.testing.assert_allclose(found.outcomes["mortality_mean"], mortality[1:].mean(1), atol=1e-5)
    np.testing.assert_allclose(found.outcomes["total_reward"], reward[1:].mean(1), atol=1e-3)
    np.testing.assert_allclose(
        found.outcomes["reward_q95"], np.quantile(reward[1:], 0.95, axis=1), atol=1e-3
    )
    # Sample s is of member s mod 2.
    members = np.stack([mortality[1:, 0::2].mean(1), mortality[1:, 1::2].mean(1)], axis=1)
    np.testing.assert_allclose(found.by_member, members, atol=1e-5)
    apart = np.abs(members[:, 0] - members[:, 1]) / np.sqrt(2)
    np.testing.assert_allclose(found.outcomes["disagreement"], apart, atol=1e-5)
    dead = np.asarray(alone.death[0], np.float64)[1:].mean(1).cumsum(1)
    np.testing.assert_allclose(found.survival[:, 1:], 1 - dead, atol=1e-5)
    np.testing.assert_array_equal(found.survival[:, 0], 1.0)


def test_the_ensemble_gets_equal_shares_of_the_futures(explorer):
    assert (explorer.sources.samples, explorer.samples) == (7, 8)


def test_nothing_is_compiled_for_another_plan_hour_or_patient(explorer):
    stay = long_stay(explorer)
    programs = []
    heard = "/jax/core/compile/backend_compile_duration"
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: programs.append(event) if event == heard else None
    )
    other = next(one for one in explorer.rows if one != stay)
    for address in (
        PatientAddress(stay, 1, (11,) * 6), PatientAddress(stay, 1, (11, 3, 4, 4, 4, 4), edit=1),
        PatientAddress(stay, 4, (3,) * 6, beside=("1,1", "2,2;0,0", CLINICIAN)),
        PatientAddress(other, 0, (3,) * 6, grid="support", history="labs"),
    ):  # fmt: skip
        patient.patient_page(explorer, address)
    assert not programs
    jax.jit(lambda x: x * 3.25 + 1)(np.zeros(3))
    assert programs


def test_known_futures_are_not_simulated_again(explorer, monkeypatch):
    address = PatientAddress(long_stay(explorer), 3, (2,) * 6)
    first = explorer.futures(address)
    monkeypatch.setattr(explorer, "_rollout", None)
    again = explorer.futures(replace(address, plan=(19,) * 6, beside=("0,2",)))
    pd.testing.assert_frame_equal(first.grid, again.grid)
    assert again.outcomes["mortality_mean"].tolist() == [
        first.grid["mortality_mean"][19], first.grid["mortality_mean"][2],
    ]  # fmt: skip


def test_the_recorded_plan_is_what_was_given_and_says_where_the_record_ends(explorer):
    stay = long_stay(explorer)
    given = np.asarray(explorer.one(stay).action)[0]
    plan, repeats = explorer.recorded_plan(stay, 1)
    np.testing.assert_array_equal(plan.actions, given[1:7])
    assert repeats is None
    last = int(explorer.length[explorer.rows[stay]]) - 1
    plan, repeats = explorer.recorded_plan(stay, last - 1)
    assert repeats == 2
    np.testing.assert_array_equal(plan.actions, [given[last - 1], *[given[last]] * 5])


def test_the_truth_under_the_record_is_the_record(explorer):
    stay = long_stay(explorer, 12)
    found = explorer.futures(PatientAddress(stay, 2, (0,) * 6))
    course = found.truth.rows[found.truth.rows["plan"] == CLINICIAN]
    recorded = np.asarray(explorer.one(stay).dynamic)[0, 2:9]
    for name in VALUES:
        np.testing.assert_allclose(course[name], recorded[:, schema.INDEX[name]], rtol=1e-3)
    died = found.truth.outcomes.set_index("plan")["true_died"][CLINICIAN]
    assert bool(died) == bool(explorer.one(stay).died_90d[0])
    assert explorer.futures(PatientAddress(stay, 2, (0,) * 6, truth=False)).truth is None


def test_records_of_people_have_no_truth(folders):
    explorer = Explorer(Sources(folders.model, folders.cohort, samples=2))
    explorer.manifest = {"source": "own table"}
    assert not explorer.knows_truth


def test_policies_are_asked_in_the_row_itself(explorer):
    stay, step = long_stay(explorer), 5
    probs = action_probs(make("guideline"), explorer.one(stay))[0, step]
    np.testing.assert_array_equal(explorer.given(stay, "guideline")[step], probs)
    page = patient.patient_page(explorer, PatientAddress(stay, step, (0,) * 6))
    clinician, guideline, titration = page["policies"]
    assert (guideline.name, titration.name) == ("guideline", "titration")
    assert guideline.probability == pytest.approx(100 * probs.max())
    assert address_of(guideline.hold).plan == (int(probs.argmax()),) * 6
    own = explorer.clinician_probs(stay, step)
    assert own.sum() == pytest.approx(1.0, abs=1e-4)
    assert clinician.probability == pytest.approx(100 * own.max())


# Charts


def test_imputed_values_are_hollow_and_in_brackets(explorer):
    stay = jax.tree.map(np.asarray, explorer.one(long_stay(explorer)))
    charts = {chart.name: chart for chart in history_charts(stay, 1, 4.0, "labs")}
    at, length = schema.INDEX["creatinine"], int(stay.length[0])
    known = stay.measured[0, :length, at]
    assert known.any() and not known.all()
    (trace,) = charts["history-creatinine"].figure["data"]
    assert trace["marker"]["symbol"] == [("circle" if one else "circle-open") for one in known]
    np.testing.assert_allclose(trace["y"], stay.dynamic[0, :length, at], atol=1e-3)
    table = patient._history_table(stay, "labs", 4.0)
    column = [row[table["columns"].index("creatinine, mg/dL")] for row in table["rows"]]
    assert [text.startswith("(") for text in column] == [not one for one in known]
    (doses,) = charts["history-fluid"].figure["data"]
    np.testing.assert_allclose(doses["y"], stay.fluid_dose[0, :length], atol=1e-3)


def test_fans_show_the_table_of_futures(explorer):
    address = PatientAddress(long_stay(explorer), 2, (6,) * 6, beside=("0,0",))
    found = explorer.futures(address)
    stay = jax.tree.map(np.asarray, explorer.one(address.stay))
    charts = fan_charts(found, stay, 2, 4.0)
    assert [chart.name for chart in charts] == [f"fan-{name}" for name in FAN_VALUES]
    rows = found.table[(found.table["feature"] == "meanbp") & (found.table["plan"] == "0,0")]
    medians = [
        trace for trace in charts[0].figure["data"]
        if trace.get("hovertemplate", "").startswith("B, hour")
    ]  # fmt: skip
    np.testing.assert_allclose(medians[0]["y"], rows["q50"], atol=1e-3)
    assert medians[0]["x"] == [8.0, 12.0, 16.0, 20.0, 24.0, 28.0, 32.0]
    for chart in charts:  # no value that JSON lacks
        json.dumps(chart.figure, allow_nan=False)


def test_a_plan_has_one_letter_and_colour_and_the_record_that_of_the_reports():
    chosen, record, other = plan_styles(["chosen", CLINICIAN, "0,0"])
    assert [one.letter for one in (chosen, record, other)] == ["A", "B", "C"]
    assert COLORS[record.color] == PLAN_COLORS[CLINICIAN]
    assert len({one.color for one in (chosen, record, other)}) == 3
    assert len({one.dash for one in (chosen, record, other)}) == 3
    assert plan_styles(["chosen", "1,1", CLINICIAN])[0].color == chosen.color


def test_warnings_name_the_plan_and_the_reason(explorer):
    found = explorer.futures(PatientAddress(long_stay(explorer), 0, (0,) * 6))
    styles = plan_styles([plan.name for plan in found.shown])
    calm = {"support": 0.2, "disagreement": 0.01, "projected_share": 0.0}
    quiet = found._replace(outcomes=found.outcomes.assign(**calm))
    assert patient._warnings(quiet, styles) == []
    rare = quiet.outcomes.assign(support=[0.2, 0.003], disagreement=[0.08, 0.01])
    apart, seldom = patient._warnings(found._replace(outcomes=rare), styles)
    assert apart.startswith("Plan A: members") and "8 percentage points" in apart
    assert seldom.startswith("Plan B: clinicians hardly ever") and "0.3%" in seldom
    unknown = quiet._replace(outcomes=quiet.outcomes.assign(support=np.nan))
    assert patient._warnings(unknown, styles) == []


# Pages


def test_the_page_of_a_patient_shows_grid_plans_and_numbers(client, explorer):
    stay = long_stay(explorer)
    answer = client.get(f"/patient?stay={stay}&step=1&plan=2,1&edit=all")
    assert answer.status_code == 200
    found = explorer.futures(PatientAddress(stay, 1, (11,) * 6))
    cells = re.findall(r'data-cell="(\d+)"[^>]*>([\d.]+)', answer.text)
    expected = [f"{100 * value:.0f}" for value in found.grid["mortality_mean"]]
    assert cells == [(str(action), text) for action, text in enumerate(expected)]
    chosen = re.findall(r'aria-selected="true"[^>]*><a[^>]*data-cell="(\d+)"', answer.text)
    assert chosen == ["11"]
    assert "vasopressor medium, fluid low throughout" in answer.text
    figures = re.findall(r'<script type="application/json">(.*?)</script>', answer.text)
    assert len(figures) == 10 + 3 + len(FAN_VALUES) and all(map(json.loads, figures))
    assert f"{100 * found.outcomes['mortality_mean'][0]:.1f} (" in answer.text


def test_a_fragment_is_the_inner_part_of_the_same_page(client, explorer):
    address = f"/patient?stay={long_stay(explorer)}&step=1"
    whole, part = client.get(address), client.get(address, headers={server.FRAGMENT: "1"})
    assert part.text.startswith('<div id="content"') and "<html" not in part.text
    assert part.text.strip() in whole.text
    assert whole.headers["vary"] == server.FRAGMENT and "no-store" in whole.headers["cache-control"]


def test_printed_python_gives_the_numbers_of_the_page(client, explorer):
    stay = long_stay(explorer)
    answer = client.get(f"/patient?stay={stay}&step=2&plan=1,2;0,0&with=clinician&with=3,3")
    names, printed = ran(code_of(answer))
    rows = names["outcomes"].to_dict("records")
    assert [row["plan"] for row in rows] == ["A", "B", "C"]
    shown = re.search(r"death within 90 days, % .*?</th>(.*?)</tr>", answer.text)[1]
    assert re.findall(r"<td>([^<]*) \(", shown) == [
        f"{100 * row['mortality_mean']:.1f}" for row in rows
    ]
    for row in rows:
        assert f"<td>{row['total_reward']:.2f} (" in answer.text
        assert f"<td>{100 * row['disagreement']:.1f}</td>" in answer.text
        assert f"<td>{100 * row['support']:.2f}</td>" in answer.text
    for alive in names["survival"][:, -1]:
        assert f"<td>{100 * alive:.1f}</td>" in answer.text
    for reward in names["truth"].outcomes["true_reward"]:
        assert f"<td>{reward:.1f}</td>" in answer.text
    assert re.search(r"^guideline \(\d, \d\)", printed, re.M)


def test_patients_are_listed_sorted_and_their_python_prints_the_list(client, explorer):
    answer = client.get("/?split=all&sort=lactate&falls=1")
    listed = [int(one) for one in re.findall(r'<a href="/patient\?stay=(\d+)">\d', answer.text)]
    table = stay_table(explorer.episodes)
    ordered = table.sort_values("lactate", ascending=False, kind="stable")
    assert listed == ordered["stay_id"].tolist()[: len(listed)] and len(listed) == 25
    assert 'aria-sort="descending"' in answer.text
    _, printed = ran(code_of(answer))
    assert printed == ordered.to_string() + "\n"
    assert client.get("/?split=all&page=99").status_code == 400


def test_dialogues_are_read_decision_by_decision(client, explorer):
    record = explorer.runs["run"].records[PATIENT]
    assert turns_of(record) == [(0, 2), (2, 3)]
    first = client.get(f"/dialogue?run=run&patient={PATIENT}").text
    assert "The chart at hour 0." in first and "What the simulator says." in first
    assert "The chart at hour 4." not in first and "The end." not in first
    assert "vasopressor low, fluid low (vasopressor 1, fluid 1)" in first
    last = client.get(f"/dialogue?run=run&patient={PATIENT}&decision=1")
    assert "The chart at hour 4." in last.text and "The end." in last.text
    assert MARKUP not in last.text and html.escape(MARKUP, quote=False)[:9] in last.text
    _, printed = ran(code_of(last))
    assert "The chart at hour 4." in printed and f"The end. {MARKUP}" in printed
    assert "hour 0" not in printed
    assert client.get("/dialogue?run=other").status_code == 400
    assert client.get(f"/dialogue?run=run&patient={PATIENT}&decision=2").status_code == 400


def test_turns_after_the_last_decision_of_a_failed_stay_are_shown_too(explorer):
    record = dict(explorer.runs["run"].records[PATIENT])
    record["decisions"] = record["decisions"][:1]
    assert turns_of(record) == [(0, 2), (2, 3)]


def test_models_that_read_windows_have_pages_without_survival(first_model, first_cohort):
    explorer = Explorer(Sources(first_model, first_cohort, samples=3))
    stay = long_stay(explorer)
    client = TestClient(server.create_app(explorer, KEY, port=PORT), base_url=ORIGIN,
                        cookies={COOKIE: KEY})  # fmt: skip
    answer = client.get(f"/patient?stay={stay}&step=1")
    assert answer.status_code == 200 and "not modelled" in answer.text
    assert "says nothing of how often clinicians treat so" in answer.text


# The key and the server


def test_nothing_is_shown_without_the_key(stranger):
    for path in ("/", "/patient?stay=1", "/static/explore.js", "/dialogue", "/nothing"):
        answer = stranger.get(path)
        assert answer.status_code == 403 and "Key needed" in answer.text
    for key in ("wrong", "", KEY[:-1], KEY + "x", "ü"):
        assert stranger.get("/", params={"key": key}).status_code == 403
        cookie = {"Cookie": f"{COOKIE}={key}".encode()}
        assert stranger.get("/", headers=cookie).status_code == 403


def test_the_key_moves_from_the_address_into_a_cookie(stranger):
    answer = stranger.get(f"/patient?stay=3&key={KEY}&plan=1,1;2,2")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/patient?stay=3&plan=1,1;2,2"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and COOKIE in cookie
    assert stranger.get("/?split=all").status_code == 200
    elsewhere = stranger.get(f"{ORIGIN}//evil.example?key={KEY}").headers["location"]
    assert elsewhere == "/evil.example"


def test_other_names_of_the_host_and_writing_are_refused(client):
    for host in ("evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:1"):
        assert client.get("/", headers={"Host": host}).status_code == 421
    assert client.get("/", headers={"Host": f"localhost:{PORT}"}).status_code == 200
    assert client.post("/").status_code == 405
    assert client.get("/static/..%2fserver.py").status_code == 404


def test_pages_may_load_nothing_from_elsewhere(client, stranger):
    for answer in (client.get("/"), stranger.get("/"), client.get("/static/explore.js")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "http" not in policy and answer.headers["referrer-policy"] == "no-referrer"
    page = client.get("/").text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page) and " style=" not in page
    assert client.get("/static/plotly.js").status_code == 200
    assert ".color-0" in client.get("/static/colors.css").text


def test_scripts_and_styles_belong_to_the_package():
    names = {file.name for file in (files("sepsis_jax.explore") / "static").iterdir()}
    assert names == set(server._STATIC)


# The command


def explore_with(capfd, folders, *more):
    given = ("explore", "--model", folders.model, "--episodes", folders.cohort)
    return call(capfd, *given, *more)


def test_a_port_in_use_is_refused(capfd, folders):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refuse(explore_with(capfd, folders, "--port", port), f"port {port}", "--port")


def test_without_the_extra_it_is_said_how_to_install_it(capfd, folders, monkeypatch):
    found = server.find_spec
    monkeypatch.setattr(server, "find_spec", lambda name: None if name == "plotly" else found(name))
    refuse(explore_with(capfd, folders), "plotly", "pip install", ".[explore]")


def test_wrong_folders_are_refused(capfd, folders, tmp_path):
    given = ("explore", "--port", 0, "--model")
    refuse(call(capfd, *given, tmp_path, "--episodes", folders.cohort), str(tmp_path))
    refuse(call(capfd, *given, folders.model, "--episodes", folders.model), str(folders.model))
    refuse(explore_with(capfd, folders, "--port", 0, "--run", tmp_path), "agent run")
    refuse(explore_with(capfd, folders, "--port", 0, "--policy", "clinician"), "clone")
    refuse(explore_with(capfd, folders, "--port", 0, "--policy", "nothing"), "nothing")


@pytest.mark.parametrize("given", [None, "a key of mine"])
def test_the_command_prints_the_address_with_the_key_once(
    given, capfd, folders, explorer, monkeypatch
):
    served = []
    monkeypatch.setattr(server, "serve", lambda app, listening: served.append(listening))
    monkeypatch.setattr("sepsis_jax.explore.explorer.Explorer", lambda sources: explorer)
    monkeypatch.setattr(server, "new_key", lambda: "fresh-key")
    monkeypatch.delenv(server.KEY_VARIABLE, raising=False)
    if given:
        monkeypatch.setenv(server.KEY_VARIABLE, given)
    result = explore_with(capfd, folders, "--port", 0)
    assert result.status == 0 and len(served) == 1
    assert result.out.count("fresh-key") == (0 if given else 1)
    assert "a key of mine" not in result.out + result.err
    assert re.search(r"^http://127\.0\.0\.1:\d+/", result.out)
    assert command.PORT == PORT


def test_new_keys_are_long_and_differ():
    assert server.new_key() != server.new_key() and len(server.new_key()) >= 32


def test_only_loopback_is_bound():
    with server.bound_socket(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
