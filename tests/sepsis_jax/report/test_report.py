"""The report of an evaluation: what its page and its files hold, and that it needs no network."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from sepsis_jax.ope.intervals import wilson
from sepsis_jax.pipelines.evaluation import policy_table
from sepsis_jax.pipelines.example_futures import PLANS, START_STEP, ExampleFutures, example_futures
from sepsis_jax.pipelines.policy_rates import RuleCounts, group_table
from sepsis_jax.pipelines.study import over_seeds
from sepsis_jax.pipelines.study_coverage import coverage_of
from sepsis_jax.pipelines.verdicts import Check, read_checks
from sepsis_jax.report import words
from sepsis_jax.report.evaluation import Findings, cells, write_report
from sepsis_jax.report.figures import COLORS, plan_colors
from sepsis_jax.report.html import CONTENTS_FROM, FlowStep, Section, write_page
from sepsis_jax.report.patients import cohort_flow, table_one
from sepsis_jax.report.study import write_study
from tests.sepsis_jax.command_line import finish
from worldmodel import schema
from worldmodel.episode_files import load_episodes, load_manifest
from worldmodel.episodes import to_table
from worldmodel.errors import InputError
from worldmodel.models.checkpoint import load_world_model

ALWAYS = ("Who is in the cohort", "Patients at a glance", "Policies", "Effective sample sizes",
          "What is given", "Kinds of patients", "Audit", "Where it comes from")  # fmt: skip
WHERE_GIVEN = ("World model", "Stages of training", "Futures of single patients",
               "Example dialogues")  # fmt: skip
RATES = dict.fromkeys(("adherence", "unsafe", "underdosing", "overdosing"), (90.0, 80.0, 100.0))


def policies(*, known):
    estimates = pd.DataFrame(
        {"policy": ["wd3qne"] * 3, "estimator": ["on_policy", "wis", "dr"],
         "estimate": [5.0, 7.0, 900.0], "low": [4.0, 6.0, -9.0], "high": [6.0, 8.0, 990.0],
         "difference": [np.nan, 2.0, 3.0], "difference_low": [np.nan, 1.0, 1.0],
         "difference_high": [np.nan, 3.0, 4.0], "ess": [50.0, 9.0, 9.0],
         "trust": [True, False, False], "reason": ["", "few", "few"]}
    )  # fmt: skip
    truth = {"clinician": (5.2, 5.0, 5.4), "wd3qne": (4.0, 3.9, 4.1)} if known else {}
    return policy_table(estimates, {"clinician": RATES, "wd3qne": RATES}, truth)


def future(stay, *, known):
    plans, hours = ("clinician", "mine"), (8.0, 12.0, 16.0)
    quantiles = {"q05": 1.0, "q25": 2.0, "q50": 3.0, "q75": 4.0, "q95": 5.0}
    names = ("meanbp", "lactate", "sofa", "output_4hourly")
    table = pd.DataFrame(
        [{"plan": plan, "hour": hour, "feature": name, **quantiles}
         for plan in plans for hour in hours for name in names]
    )  # fmt: skip
    outcomes = pd.DataFrame(
        {"plan": plans, "mortality_mean": 0.3, "mortality_q05": 0.1, "mortality_q95": 0.5,
         "total_reward": 2.0, "map_below_65": 0.2, "ventilation": 0.4, "given": "no treatment"}
    )  # fmt: skip
    past = pd.DataFrame({"hour": [4.0, 8.0], **dict.fromkeys(names, 3.0)})
    truth = None
    if known:
        outcomes = outcomes.assign(true_died=[True, False], true_reward=[-14.0, 13.0])
        truth = table[table.feature == "sofa"][["plan", "hour"]].assign(**dict.fromkeys(names, 3.5))
    return ExampleFutures(stay, "low blood pressure", table, outcomes, past, truth)


RECORD = {
    "patient": 7, "status": "completed", "decisions": [{}, {}], "tool_calls": 3,
    "invalid": {"schema": 1}, "closing": "",
    "turns": [{"messages": [{"role": "user", "content": "MAP is <b>low</b> & falling"}],
               "reply": {"reasoning": "", "content": "more", "tool_calls": []}}],
}  # fmt: skip


def findings(cohort, *, full):
    episodes = load_episodes(cohort)
    chosen = episodes.of_split("test")
    count = chosen.num_stays
    counts = {
        name: RuleCounts(
            {rate: np.full(count, 0.9 * 5) for rate in ("adherence", "unsafe")}, np.full(count, 5.0)
        )
        for name in ("clinician", "wd3qne")
    }
    found = Findings(
        episodes=episodes, manifest=load_manifest(cohort), split="test",
        policies=policies(known=full), ess_by_step={"wd3qne": [9.0, 4.0, 2.0]}, needed=250.0,
        shares={"clinician": np.full((5, 5), 4.0), "wd3qne": 100.0 * np.eye(5) / 5},
        groups=group_table(chosen, np.zeros(count), pd.DataFrame({"group": ["x"]}), counts),
        checks=[Check("90% intervals of meanbp", "pass", 0.1, None, 0.2, "From urine_24h.")],
        facts={"command": "sepsis-jax evaluate", "stays": count, "seed": 3,
               "versions": {"jax": "1"}},
    )  # fmt: skip
    if not full:
        return found
    bins = [("last", "world model", 20.0, 25.0, 10.0, 40.0, 30, 30),
            ("every", "world model", 60.0, 55.0, 40.0, 70.0, 90, 30)]  # fmt: skip
    names = ["when", "who", "predicted", "observed", "observed_low", "observed_high", "rows",
             "stays"]  # fmt: skip
    model = pd.DataFrame(
        {"who": "world model", "value": 0.4, "low": 0.3, "high": 0.5,
         "metric": ["state MAE", "output_4hourly MAE, 6 steps ahead",
                    "mortality AUROC, last row"]}
    )  # fmt: skip
    stages = pd.DataFrame({"stage": ["sft", "sft, simulator none"], "true": [4.0, 5.0],
                           "true_low": [3.0, 4.0], "true_high": [5.0, 6.0]})  # fmt: skip
    for name in ("dr", "wis", "wpdis", "adherence"):
        stages[name] = np.nan
    return replace(
        found, world_model=model, calibration=pd.DataFrame(bins, columns=names), stages=stages,
        futures=[future(7, known=True), future(8, known=True)], dialogues={"rl": [RECORD]},
        published=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, findings(cohort, full=True))
    return folder


def visible(page, *, without=("pre", "style")):
    """Text that a reader sees, but for messages and for commands and paths."""
    page = page.split('<section id="where-it-comes-from">')[0]
    for tag in without:
        page = re.sub(rf"<{tag}\b.*?</{tag}>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def raw_keys(page):
    return sorted(set(re.findall(r"\b[A-Za-z]+_\w+", visible(page))))


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_every_section_is_there_where_its_input_is_and_none_is_made_up(written, cohort, tmp_path):
    assert set(headings((written / "report.html").read_text())) == {*ALWAYS, *WHERE_GIVEN}
    write_report(tmp_path, findings(cohort, full=False))
    page = (tmp_path / "report.html").read_text()
    assert tuple(headings(page)) == ALWAYS
    assert "true value" not in page and "Published" not in page and "truth" not in visible(page)
    names = json.loads((tmp_path / "tables.json").read_text())
    assert not {"world_model", "stages", "calibration", "example_outcomes"} & set(names)


def test_the_page_needs_nothing_from_elsewhere(written):
    page = (written / "report.html").read_text()
    targets = re.findall(r'(?:src|href)="([^"]*)"', page)
    anchors = set(re.findall(r'\bid="([^"]+)"', page))
    assert targets and all(t.startswith(("#", "data:")) for t in targets)
    assert {t[1:] for t in targets if t.startswith("#")} <= anchors
    assert {t[1:-1] for t in re.findall(r"url(\(#[^)]+\))", page)} <= {f"#{a}" for a in anchors}
    assert "http" not in page and "<script" not in page and "@import" not in page
    assert len(re.findall(r'\bid="', page)) == len(anchors)  # each once
    assert len(headings(page)) >= CONTENTS_FROM and page.count("<nav") == 1
    assert len(page) < 3_000_000


def test_every_picture_says_what_it_is_and_follows_the_theme(written):
    page = (written / "report.html").read_text()
    pictures = re.findall(r"<svg[^>]*>", page)
    assert len(pictures) > 10 and "<img" not in page
    assert all(re.search(r'role="img" aria-label="[^"]{10,}"', one) for one in pictures)
    drawn = page.split("<body>")[1]
    assert "var(--ink, #1b1f24)" in drawn and "#010203" not in drawn
    assert not re.search(r"(?:fill|stroke): (?:#000000|black)", drawn)
    assert "prefers-color-scheme: dark" in page


def test_what_a_reader_sees_are_words(written):
    page = (written / "report.html").read_text()
    assert raw_keys(page) == []
    text = " ".join(visible(page).split())
    for expected in ("urine output per step 24 h ahead, mean error, mL", "value, WIS", "WD3QNE",
                     "90% intervals of mean arterial pressure", "After ", "true value",
                     "after patient dynamics, without simulator", "too few stays"):  # fmt: skip
        assert expected.lower() in text.lower(), expected
    assert "MAP is &lt;b&gt;low&lt;/b&gt; &amp; falling" in page
    assert "died" in text and "lived" in text  # the truth beside predicted mortality


def test_every_table_is_a_file_in_three_forms(written):
    page = (written / "report.html").read_text()
    names = set(json.loads((written / "tables.json").read_text())) - {"rank_correlation"}
    assert len(names) == page.count("<table>")
    for name in names:
        table = pd.read_csv(written / f"{name}.csv")
        assert len(table)
        lines = (written / f"{name}.tex").read_text().splitlines()
        columns = len(re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines[0]).group(1))
        rows = [line for line in lines if line.endswith(r" \\")]
        assert len(rows) >= 2
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns}, name
        assert not any(re.search(r"(?<!\\)[%#_$]", row) for row in rows), name
    assert json.loads((written / "tables.json").read_text())["policies"][1]["wis"] == 7.0
    assert "97.95" in (written / "published_policies.tex").read_text()
    assert "0.7996" in (written / "published_stages.tex").read_text()


def test_the_same_findings_are_the_same_bytes(written, cohort, tmp_path):
    write_report(tmp_path, findings(cohort, full=True))
    files = [path.relative_to(written) for path in written.rglob("*") if path.is_file()]
    assert all((written / one).read_bytes() == (tmp_path / one).read_bytes() for one in files)


def test_estimates_beyond_the_panel_do_not_flatten_the_others(written):
    drawn = (written / "figures" / "value_dr.svg").read_text()
    assert ">900<" in drawn and ">800<" not in drawn


def test_table_one_is_what_the_rows_say(cohort):
    episodes = load_episodes(cohort)
    rows = to_table(episodes)
    day = rows[rows["step"] < 6]
    died = rows.groupby("stay_id")["died_90d"].first()
    lactate = day[day["lactate_measured"]].groupby("stay_id")["lactate"].max()
    pressure = day[day["meanbp_measured"]].groupby("stay_id")["meanbp"].min()
    everyone = np.ones(episodes.num_stays, bool)
    masks = {"all": everyone, "non-survivors": np.asarray(episodes.died_90d)}
    table = table_one(episodes, masks, schema.STEP_HOURS).set_index(["characteristic", "group"])
    of = table.loc["highest lactate of the first 24 h, mmol/L"]
    assert of.loc["all", "known"] == len(lactate)
    assert of.loc["all", "missing"] == pytest.approx(100 * (1 - len(lactate) / len(died)))
    assert of.loc["all", "value"] == pytest.approx(lactate.median(), rel=1e-5)
    dead = lactate[lactate.index.isin(died[died].index)]
    assert of.loc["non-survivors", "high"] == pytest.approx(dead.quantile(0.75), rel=1e-5)
    low = table.loc["lowest mean arterial pressure of the first 24 h, mmHg"]
    assert low.loc["all", "value"] == pytest.approx(pressure.median(), rel=1e-5)
    dying = table.loc["died within 90 days, %"]
    assert dying.loc["all", "value"] == pytest.approx(100 * died.mean())
    assert dying.loc["non-survivors", "count"] == died.sum()
    given = rows.groupby("stay_id")["vasopressor_level"].max() > 0
    assert table.loc["vasopressor at any time, %"].loc["all", "count"] == given.sum()


def test_the_flow_of_a_hospital_is_that_of_its_manifest(cohort):
    episodes = load_episodes(cohort)
    count = episodes.num_stays
    lines = [{"step": "stays", "reason": "ICU stays", "excluded": 0, "remaining": count + 5},
             {"step": "adults", "reason": "younger than 18", "excluded": 5,
              "remaining": count}]  # fmt: skip
    flow = cohort_flow(episodes, {"consort": lines}, "test")
    assert [step.remaining for step in flow[:2]] == [count + 5, count]
    tested = int((np.asarray(episodes.split) == 2).sum())
    assert flow[2].remaining == tested and flow[2].excluded == count - tested
    assert len(cohort_flow(episodes, {}, "all")) == 1


def test_a_reason_that_leaves_nobody_out_makes_no_box(tmp_path):
    steps = [("all ICU stays", 0, 9), ("younger than 18", 0, 9), ("late", 4, 5), ("short", 0, 5)]
    section = Section("Cohort", (), flow=[FlowStep(*step) for step in steps])
    page = write_page(tmp_path / "page.html", "A page", [section]).read_text()
    (flow,) = re.findall(r'<ol class="flow">(.*?)</ol>', page, re.DOTALL)
    assert re.findall(r"<(?:b|span)>(.*?)</", flow) == [
        "9: all ICU stays", "none left out: younger than 18", "4 left out: late", "5 remain",
        "none left out: short", "5 remain",
    ]  # fmt: skip


def test_estimates_of_any_size_are_short():
    row = {"policy": "iql", "dr": 12606128128.0, "dr_low": -64682607092.1, "dr_high": 3.14159}
    _, (found,) = cells("policies", pd.DataFrame([row]), ["dr"])
    assert found == ("IQL", "1.26e+10 (-6.47e+10 to 3.14)")


def test_wilson_is_that_of_scipy():
    for deaths, count in ((0, 12), (3, 40), (40, 40)):
        expected = binomtest(deaths, count).proportion_ci(0.95, method="wilson")
        assert wilson(deaths / count, count) == pytest.approx(tuple(expected), abs=1e-4)


def test_plans_have_one_colour_in_any_company():
    assert plan_colors(["nothing", "clinician"])["clinician"] == COLORS[0]
    assert plan_colors(["clinician", "both", "nothing"])["nothing"] == COLORS[1]
    mixed = plan_colors(["mine", "clinician", "fluids"])
    assert len(set(mixed.values())) == 3 and mixed["fluids"] == COLORS[2]


def test_plans_and_metrics_in_words():
    both = schema.action_index(2, 3)
    assert words.plan([both, 11, 11]) == (
        "vasopressor medium, fluid high (1 step), then vasopressor medium, fluid low (2 steps)"
    )
    assert words.plan([0, 0]) == "no treatment throughout"
    assert words.metric("lactate MAE, 3 steps ahead", 2.0) == (
        "lactate 6 h ahead, mean error, mmol/L"
    )


def test_the_truth_of_a_synthetic_patient_goes_on_as_recorded_under_the_clinician(cohort, model):
    episodes = load_episodes(cohort).of_split("test")
    world_model, manifest = load_world_model(model), load_manifest(cohort)
    found = example_futures(world_model, episodes, manifest, samples=2, seed=0)
    assert found
    stays = np.asarray(episodes.stay_id).tolist()
    for one in found:
        row = stays.index(one.stay_id)
        course = one.truth[one.truth["plan"] == PLANS[0]]
        steps = START_STEP + np.arange(len(course))
        recorded = np.asarray(episodes.dynamic)[row, steps, schema.INDEX["meanbp"]]
        np.testing.assert_allclose(course["meanbp"], recorded, rtol=1e-4)
        died = one.outcomes.set_index("plan").loc[PLANS[0], "true_died"]
        assert bool(died) == bool(episodes.died_90d[row])
    others = example_futures(world_model, episodes, {"source": "own table"}, samples=2, seed=0)
    assert others[0].truth is None and "true_died" not in others[0].outcomes
    elsewhere = manifest | {"options": manifest["options"] | {"seed": 99}}
    assert example_futures(world_model, episodes, elsewhere, samples=2, seed=0)[0].truth is None


def test_verdicts_of_an_audit_are_read(tmp_path):
    with pytest.raises(InputError, match=r"audit\.json"):
        read_checks(tmp_path)
    row = {"name": "a", "verdict": "pass", "value": 0.0, "bound": None, "limit": 1.0, "text": "b"}
    (tmp_path / "audit.json").write_text(json.dumps({"checks": [row]}))
    assert read_checks(tmp_path) == [Check("a", "pass", 0.0, None, 1.0, "b")]


def test_the_page_of_a_study_says_spreads_or_that_there_are_none(tmp_path):
    of = {seed: policies(known=True).assign(wis=5.0 + 2.0 * seed) for seed in (0, 1)}
    done = {seed: {"cohort": "ab" * 32} for seed in of}
    write_study(tmp_path, {"policies": over_seeds(of)}, done, {"command": "sepsis-jax study"})
    page = (tmp_path / "report.html").read_text()
    assert "6.00 ± 1.41" in page and "seed-1/evaluation/report.html" in page
    assert raw_keys(page) == []
    write_study(tmp_path, {"policies": over_seeds(of)}, done, {"command": "x"}, coverage_of(of))
    page = (tmp_path / "report.html").read_text()
    assert "hold the truth, %" in page and (tmp_path / "coverage.csv").exists()
    assert raw_keys(page) == []
    one = {0: of[0]}
    write_study(tmp_path, {"policies": over_seeds(one)}, {0: done[0]}, {"command": "x"})
    assert "no spread between seeds" in (tmp_path / "report.html").read_text()


CHROMIUM = shutil.which("chromium")
HARNESS = """<!doctype html><body><iframe id=f width=390 height=800 style="border:0"></iframe>
<script>
const frame = document.getElementById("f"); frame.srcdoc = PAGE;
frame.onload = () => { const d = frame.contentDocument;
  d.querySelectorAll("details").forEach(x => x.open = true);
  document.body.dataset.widths = [d.documentElement.clientWidth, d.documentElement.scrollWidth]; };
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_no_telephone_has_to_scroll_sideways(written, tmp_path):
    page = (written / "report.html").read_text()
    client, needed = widths(page, tmp_path)
    assert needed == client and 370 <= client <= 390  # less a scroll bar
    too_wide = page.replace("</h1>", '</h1><div style="width: 600px">wide</div>')
    assert widths(too_wide, tmp_path)[1] >= 600


def widths(page, folder):
    """Width of a telephone's page, and what its content needs, with everything folded open."""
    harness = folder / "harness.html"
    harness.write_text(HARNESS.replace("PAGE", json.dumps(page).replace("</", "<\\/")))
    seen = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--dump-dom", "--virtual-time-budget=10000",
         f"--user-data-dir={folder / 'profile'}", str(harness)],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    found = re.search(r'data-widths="(\d+),(\d+)"', seen)
    assert found is not None
    return int(found.group(1)), int(found.group(2))


@pytest.mark.slow
def test_the_demo_speaks_in_words_and_shows_the_truth(tmp_path):
    finish("demo", "--out", tmp_path / "demo", "--patients", 300, "--samples", 20)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert raw_keys(page) == []
    assert {"Is it true?", "Futures of single patients", "What is given", "Audit"} <= set(
        headings(page)
    )
    assert "true mortality, %" in page and "http" not in page
    assert (tmp_path / "demo" / "tables" / "choice.tex").exists()
