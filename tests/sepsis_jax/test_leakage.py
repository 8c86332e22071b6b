"""Leakage checks: clean episodes pass, and each kind of leak is found by the check made for it."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sepsis_jax.pipelines import leakage
from sepsis_jax.pipelines.leakage import audit_episodes
from sepsis_jax.pipelines.verdicts import (
    FAIL,
    NOT_RUN,
    PASS,
    SUSPECT,
    above,
    auroc,
    compare_means,
    partial_correlations,
    predicted_auroc,
    spread,
    summary_line,
    within,
)
from worldmodel import schema
from worldmodel.clinical import sofa
from worldmodel.synthetic import generate

ROWS = ("dynamic", "measured", "ventilated", "sofa", "urine_24h")
GIVEN = ("vasopressor", "fluid", "vasopressor_dose", "fluid_dose")


@pytest.fixture(scope="module")
def clean():
    episodes, _ = generate(jax.random.key(3), 300, keep_latent=False)
    episodes = episodes.select(np.asarray(episodes.length) > 1)
    return jax.tree.map(np.asarray, episodes)


def verdicts(episodes):
    return {check.name: check.verdict for check in audit_episodes(episodes).checks}


def found(episodes):
    return {name for name, verdict in verdicts(episodes).items() if verdict == FAIL}


def with_feature(episodes, name, values):
    dynamic = episodes.dynamic.copy()
    dynamic[..., schema.INDEX[name]] = np.where(episodes.valid, values, 0)
    return replace(episodes, dynamic=dynamic)


def feature(episodes, name):
    return episodes.dynamic[..., schema.INDEX[name]]


def test_clean_episodes_pass(clean):
    audit = audit_episodes(clean)
    assert {check.verdict for check in audit.checks} == {PASS}, summary_line(audit.checks)
    table = audit.columns.set_index(["drug", "column"])
    # A low pressure is the reason for a vasopressor: the row tells it, and better than others.
    told = table.loc["vasopressor", "meanbp"]
    assert told["auroc"] < told["auroc_before"] < told["auroc_permuted"] < 0.5


def test_rows_that_are_one_step_late_are_found(clean):
    """Row t holds row t + 1: what the treatment has done is seen before it is given."""
    length = clean.length - 1
    kept = np.arange(clean.num_steps) < length[:, None]

    def late(leaf):
        moved = np.concatenate([leaf[:, 1:], np.zeros_like(leaf[:, :1])], axis=1)
        return np.where(kept.reshape(*kept.shape, *(1,) * (leaf.ndim - 2)), moved, 0).astype(
            leaf.dtype
        )

    rows = {name: late(getattr(clean, name)) for name in ROWS}
    given = {name: np.where(kept, getattr(clean, name), 0) for name in GIVEN}
    assert found(replace(clean, length=length, **rows, **given)) >= {
        "change of MAP at a vasopressor's start",
        "vasopressor of its own row in SOFA",
        "values that appear with the treatment",
        "values that are functions of the treatment",
        "vasopressor starts predicted from the row",
    }


@pytest.mark.parametrize(("share", "verdict"), [(1.0, FAIL), (0.5, FAIL), (0.2, SUSPECT)])
def test_a_sofa_that_counts_its_own_vasopressor_is_found(clean, share, verdict):
    """As of a share of the rows, which a score that is taken at some hour of the step would be."""
    own = sofa.standard(
        clean.dynamic,
        ventilated=clean.ventilated,
        vasopressor_dose=clean.vasopressor_dose,
        urine_24h=clean.urine_24h,
    ).total
    some = np.random.default_rng(0).random(clean.sofa.shape) < share
    leaky = np.where(clean.valid & some, own, clean.sofa).astype(np.float32)
    assert verdicts(replace(clean, sofa=leaky))["vasopressor of its own row in SOFA"] == verdict


@pytest.mark.parametrize("mmhg", [5.0, 1.0])
def test_a_pressure_that_holds_the_dose_is_found(clean, mmhg):
    leaky = with_feature(clean, "meanbp", feature(clean, "meanbp") + mmhg * clean.vasopressor)
    names = found(leaky)
    assert "values that are functions of the treatment" in names
    assert ("change of MAP at a vasopressor's start" in names) == (mmhg == 5.0)


def test_a_value_that_is_the_treatment_is_found(clean):
    assert "vasopressor starts predicted from the row" in found(
        with_feature(clean, "albumin", 3.0 - 1.0 * (clean.vasopressor > 0))
    )
    assert "values that are functions of the treatment" in found(
        with_feature(clean, "albumin", 2.0 + 0.1 * clean.fluid)
    )


def test_the_urine_of_the_next_step_is_found(clean):
    day = np.concatenate([clean.urine_24h[:, 1:], clean.urine_24h[:, -1:]], axis=1)
    assert "next step in the urine of 24 h" in found(
        replace(clean, urine_24h=np.where(clean.valid, day, 0))
    )


def test_an_outcome_in_the_first_row_is_found(clean):
    died = clean.died_90d[:, None]
    names = {"outcome in a value of the first row", "death predicted from the first row"}
    assert found(with_feature(clean, "albumin", np.where(died, 2.0, 3.0))) >= names
    # No line, and no order: only the model of quintiles sees that two values mean death.
    odd = np.where(np.arange(len(died)) % 2, 1.0, 5.0)[:, None]
    leaky = with_feature(clean, "albumin", np.where(died, odd, 3.0))
    assert "death predicted from the first row" in found(leaky)
    assert "outcome in a value of the first row" not in found(leaky)
    flags = clean.measured.copy()
    flags[..., 11] = died & clean.valid
    assert "outcome in a value of the first row" in found(replace(clean, measured=flags))


def test_rows_without_measurement_at_the_end_are_found(clean):
    flags = clean.measured.copy()
    for stay in np.flatnonzero(clean.died_in_hospital):
        flags[stay, max(clean.length[stay] - 3, 0) :] = False
    assert "rows after the outcome" in found(replace(clean, measured=flags))


def test_faults_of_records_are_found(clean):
    clean = clean.select(np.arange(60))
    subject = clean.subject_id.copy()
    test, train = (np.flatnonzero(clean.split == split)[0] for split in (2, 0))
    subject[test] = subject[train]
    assert found(replace(clean, subject_id=subject)) == {"patients in two splits"}
    twice = clean.select(np.append(np.arange(clean.num_stays), 0))
    assert found(twice) == {"stays recorded twice"}
    renamed = twice.stay_id.copy()
    renamed[-1] = renamed.max() + 1
    assert found(replace(twice, stay_id=renamed)) == {"stays recorded twice"}
    late = clean.sofa.copy()
    short = int(np.argmin(clean.length))
    late[short, clean.length[short]] = 4
    assert found(replace(clean, sofa=late)) == {"rows after the end of a stay"}
    dose = np.where(clean.valid, clean.fluid_dose + 200.0, 0)
    assert "levels differ from doses" in found(replace(clean, fluid_dose=dose))


def test_few_stays_are_not_judged(clean):
    few = verdicts(clean.select(np.arange(4)))
    assert few["values that are functions of the treatment"] == NOT_RUN
    assert few["death predicted from the first row"] == NOT_RUN
    assert few["change of MAP at a vasopressor's start"] == NOT_RUN
    assert few["patients in two splits"] == PASS


def test_many_stays_are_drawn_from(clean, monkeypatch):
    whole = audit_episodes(clean).columns["events"].max()
    monkeypatch.setattr(leakage, "MAX_STAYS", 120)
    part = audit_episodes(clean).columns["events"].max()
    assert 0.3 * whole < part < 0.5 * whole


# Statistics


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_auroc_and_its_error(random):
    """Beside scikit-learn, and beside a bootstrap over patients whose rows are alike."""
    patient = np.repeat(np.arange(80), 5)
    event = random.random(400) < 0.3
    level = random.normal(size=80)[patient]
    score = np.round(level + event + random.normal(size=400), 1)  # with ties
    area, influence = auroc(score, event)
    assert area == pytest.approx(roc_auc_score(event, score))
    rows = [np.flatnonzero(patient == i) for i in range(80)]
    drawn = []
    for _ in range(300):
        chosen = np.concatenate([rows[i] for i in random.integers(0, 80, 80)])
        drawn.append(roc_auc_score(event[chosen], score[chosen]))
    assert spread(influence, patient) == pytest.approx(np.std(drawn), rel=0.15)


def test_partial_correlations_are_those_of_residuals(random):
    known, noise = random.normal(size=(3000, 2)), random.normal(size=(3000, 3))
    first = known[:, 0] + noise[:, 0]
    second = first + noise[:, 1]
    other = known[:, 1] + second + noise[:, 2]
    one, two = partial_correlations(np.column_stack([first, second]), other, known, np.arange(3000))
    assert abs(one.value) < 0.05  # what it tells is told by the second column
    assert two.value == pytest.approx(np.sqrt(0.5), abs=0.03)
    assert two.error == pytest.approx(0.5 / np.sqrt(3000), rel=0.2)  # (1 - r^2) / sqrt(n)


def test_predictions_do_not_learn_patients_by_heart(random):
    patient = np.repeat(np.arange(100), 6)
    event = (random.random(100) < 0.5)[patient]  # constant within a patient
    inputs = random.normal(size=(100, 30))[patient]
    estimate = predicted_auroc(inputs, event, patient, random)
    assert abs(estimate.value - 0.5) < 0.15
    told = predicted_auroc(np.column_stack([inputs, event]), event, patient, random)
    assert told.value > 0.95


def test_intervals_of_a_true_model_hold_the_means(random):
    inside = []
    for _ in range(200):
        chance = random.uniform(0.1, 0.9, 200)
        happened = (random.random(200) < chance).astype(float)
        groups = {"all": np.ones(200, bool), "half": np.arange(200) < 100}
        table = compare_means(happened, chance, chance * (1 - chance), groups, intervals=2)
        inside.append(table["inside"].all())
    assert 0.92 < np.mean(inside) <= 1.0
    wrong = compare_means(happened, 0.8 * chance, chance * (1 - chance), groups, intervals=2)
    assert not wrong["inside"].all()


def test_verdicts():
    def verdict(value, bound):
        return above("x", value, bound, "", suspect=0.1, fail=0.2).verdict

    assert [verdict(0.3, 0.15), verdict(0.3, 0.05), verdict(0.15, 0.12)] == [FAIL, SUSPECT, SUSPECT]
    assert [verdict(0.05, None), verdict(0.15, None), verdict(0.3, None)] == [PASS, SUSPECT, FAIL]
    inside, near, beyond = (within("x", value, 0.02, (0.85, 0.95), "") for value in (0.9, 0.84, 1))
    assert [inside.verdict, near.verdict, beyond.verdict] == [PASS, SUSPECT, FAIL]
    assert near.limit == 0.85 and beyond.limit == 0.95
    line = summary_line([replace(inside, name="a"), replace(beyond, name="b")])
    assert line == "1 of 2 checks pass; fail: b"
