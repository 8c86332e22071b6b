"""Prompts: the agent sees only what is known, and templates of users are sandboxed."""

import numpy as np
import pytest

from policy.agent.forecast import Forecast
from policy.agent.prompts import FORECAST, OWN_SETS, SHOWN, Chart, Prompts, options
from worldmodel import schema
from worldmodel.errors import InputError


@pytest.fixture(scope="module")
def chart(make_ward):
    return Chart.of(make_ward().initial(0))


def forecast(support):
    rows = np.tile(np.arange(39, dtype=np.float32), (2, 1))
    score = np.full(2, 7.0)
    return Forecast(rows + 0.04, rows - 1, rows + 1, score, score / 10, score / 100, support)


@pytest.mark.parametrize("templates", OWN_SETS)
def test_charts_show_the_newest_row(chart, templates):
    text = Prompts(templates).first(chart, can_simulate=True)[-1]["content"]
    meanbp = chart.dynamic[-1][schema.INDEX["meanbp"]]
    assert f"{meanbp:.0f}" in text and f"{chart.age:.0f} y" in text
    assert ("simulat" in text) and "simulat" not in "".join(
        message["content"] for message in Prompts("compact").first(chart, can_simulate=False)
    )


def test_full_charts_hold_what_the_published_agent_sees(chart):
    text = Prompts("full").first(chart, can_simulate=True)[-1]["content"]
    lines = {line.split(" [")[0] for line in text.splitlines() if "]: " in line}
    assert lines == set(SHOWN)
    assert len(SHOWN) == 8 + 26 + 1 and "inr" not in lines and not any("gcs" in x for x in lines)


def test_simulations_tell_means_intervals_and_missing_support():
    found = options((0, 24), forecast(np.array([0.5, 0.001])))
    text = Prompts("full", support_limit=0.01).simulation(found)
    assert text.count("Warning") == 1 and "0.1%" in text
    lactate = schema.INDEX["lactate"]
    assert f"lactate [mmol/L]: {lactate:.1f} ({lactate - 1:.1f} to {lactate + 1:.1f})" in text
    for name in FORECAST:
        assert text.count(f"- {name} ") == 2
    assert text.count("- SOFA: 7.0 (mean)\n- Ventilated: 70%\n") == 2
    assert text.count("differ by 0.07 standard deviations") == 2
    assert "(" not in Prompts("full", intervals=False).simulation(found).split("- lactate")[1][:20]
    unknown = options((0, 24), forecast(np.full(2, np.nan)))
    assert "Warning" not in Prompts("full").simulation(unknown)


def test_users_templates(tmp_path, chart):
    for name in ("first", "simulation", "prescription", "error"):
        (tmp_path / f"{name}.md.j2").write_text(f"{name}: {{{{ message|default('-') }}}}")
    (tmp_path / "system.md.j2").write_text("You are {{ chart.age|int }}.")
    prompts = Prompts(tmp_path)
    assert [m["role"] for m in prompts.first(chart, can_simulate=True)] == ["system", "user"]
    assert prompts.error("no") == "error: no"
    (tmp_path / "error.md.j2").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(InputError, match=r"error\.md\.j2"):
        Prompts(tmp_path).error("no")
    (tmp_path / "error.md.j2").write_text("{{ nothing }}")
    with pytest.raises(InputError, match="nothing"):
        Prompts(tmp_path).error("no")
    (tmp_path / "error.md.j2").write_text("{% if %}")
    with pytest.raises(InputError):
        Prompts(tmp_path)
    (tmp_path / "error.md.j2").unlink()
    with pytest.raises(InputError, match=r"no error\.md\.j2"):
        Prompts(tmp_path)
