"""Who enters the cohort."""

from datetime import datetime, timedelta

import pandas as pd
import pytest

from tests.sepsis_jax.cohort.tiny import ADMITTED, CREATININE, NOREPINEPHRINE, Tiny
from worldmodel.errors import InputError


def lines(report):
    return {line["step"]: (line["excluded"], line["remaining"]) for line in report.consort}


def test_every_exclusion_is_counted(build):
    tiny = Tiny()
    tiny.septic_stay(1)
    tiny.septic_stay(1, number=2, admitted=ADMITTED + timedelta(days=20))  # not the first
    tiny.septic_stay(2, age=17)
    healthy = tiny.stay(3)  # no infection
    tiny.chart(healthy, 1, 220045, 80)
    infected = tiny.stay(4)  # SOFA 0
    tiny.chart(infected, 1, 220045, 80)
    tiny.antibiotic(infected, 2)
    tiny.culture(infected, 1)
    tiny.septic_stay(5, hours=4)  # one step
    tiny.stay(6)
    tiny.tables["icustays"][-1]["outtime"] = None
    episodes, report = build(tiny)
    assert episodes.stay_id.tolist() == [30_000_011]
    assert lines(report) == {
        "source": (0, 7),
        "times": (1, 6),
        "age": (1, 5),
        "first": (1, 4),
        "infection": (1, 3),
        "sofa": (1, 2),
        "length": (1, 1),
    }
    assert report.manifest["consort"] == list(report.consort)


def test_which_stays_of_a_patient(build):
    tiny = Tiny()
    first = tiny.stay(1)
    tiny.chart(first, 1, 220045, 80)
    for number in (2, 3):
        tiny.septic_stay(1, number=number, admitted=ADMITTED + timedelta(days=20 * number))
    with pytest.raises(InputError, match="no stay is left"):
        build(tiny)
    septic, _ = build(tiny, stays="first-septic")
    every, report = build(tiny, stays="all")
    open_to_all, _ = build(tiny, stays="all", require_sepsis=False)
    assert septic.stay_id.tolist() == [30_000_012]
    assert every.stay_id.tolist() == [30_000_012, 30_000_013]
    assert open_to_all.stay_id.tolist() == [30_000_011, 30_000_012, 30_000_013]
    assert (report.stays, report.patients, report.rows) == (2, 1, 12)


INFECTIONS = [
    # hour of the antibiotic, hour of the culture, with a time, suspected
    (2, -70, True, True),  # culture at most 72 h before the antibiotic
    (2, -71, True, False),
    (2, 26, True, True),  # culture at most 24 h after it
    (2, 27, True, False),
    (2, -80, False, True),  # by day: 26 February to 1 March
    (2, -81, False, False),
    (2, 39, False, True),  # by day: the day after
    (2, 41, False, False),
    (-1, 0, True, False),  # ordered before the ICU stay
]


def test_suspected_infection(build, tmp_path):
    tiny = Tiny()
    stays = [tiny.septic_stay(subject) for subject in range(len(INFECTIONS))]
    tiny.tables["prescriptions"].clear()
    tiny.tables["microbiologyevents"].clear()
    for stay, (antibiotic, culture, timed, _) in zip(stays, INFECTIONS, strict=True):
        tiny.antibiotic(stay, antibiotic)
        tiny.culture(stay, culture, timed=timed)
    build(tiny, derived_out=tmp_path / "derived")
    orders = pd.read_parquet(tmp_path / "derived" / "suspicion.parquet")
    suspected = set(orders.loc[orders["suspected_infection"], "stay_id"].dropna())
    assert [stay in suspected for stay in stays] == [expected for *_, expected in INFECTIONS]


def test_drugs_that_do_not_count(build):
    tiny = Tiny()
    stays = [tiny.septic_stay(subject) for subject in range(5)]
    tiny.tables["prescriptions"].clear()
    tiny.antibiotic(stays[0], 2, drug="Vancomycin 5% Cream")
    tiny.antibiotic(stays[1], 2, drug="Heparin")
    tiny.antibiotic(stays[2], 2, drug="Gentamicin", route="LEFT EYE")
    tiny.antibiotic(stays[3], 2, drug="Gentamicin", route="AU")
    tiny.antibiotic(stays[4], 2, drug="CefTRIAXone", route="IV")
    assert build(tiny)[0].stay_id.tolist() == stays[4:]


def test_sofa_must_be_near_the_infection(build):
    tiny = Tiny()
    stay = tiny.stay(1, hours=100)
    for hour in range(100):
        tiny.chart(stay, hour, 220045, 80)
    tiny.antibiotic(stay, 2)
    tiny.culture(stay, 1)
    tiny.lab(stay, 30, CREATININE, 2.5, unit="mg/dL")  # suspected at 1 h, so 25 h is the end
    with pytest.raises(InputError, match=r"SOFA below 2.*: 1"):
        build(tiny)
    tiny.lab(stay, 24.5, CREATININE, 2.5, unit="mg/dL")
    assert build(tiny)[0].num_stays == 1


DEATHS = [
    # recorded day of death, died in hospital, dead by day 90 of the ICU stay
    (None, False, False),
    (datetime(2150, 5, 30), False, True),  # day 90
    (datetime(2150, 5, 31), False, False),
    (datetime(2149, 12, 31), False, False),  # before admission: an error
    (datetime(2144, 9, 9), True, True),  # so here, but the hospital knows better
    (None, True, True),  # known from the hospital stay only
]


def test_death_within_90_days(build):
    tiny = Tiny()
    for subject, (dod, died_in_hospital, _) in enumerate(DEATHS):
        tiny.septic_stay(subject, dod=dod, died=died_in_hospital)
        tiny.tables["admissions"][-1]["admittime"] -= timedelta(days=1)
    episodes, _ = build(tiny)
    assert episodes.died_90d.tolist() == [dead for *_, dead in DEATHS]
    assert episodes.died_in_hospital.tolist() == [died for _, died, _ in DEATHS]
    by_hospital, _ = build(tiny, death_clock="hospital-admission")
    assert by_hospital.died_90d.tolist() == [False] * 4 + [True] * 2
    longer, _ = build(tiny, death_days=91)
    assert longer.died_90d.tolist() == [False, True, True, False, True, True]


def test_no_row_begins_after_death(build):
    tiny = Tiny()
    hour = timedelta(hours=1)
    tiny.septic_stay(1, death=ADMITTED + 9 * hour)
    tiny.septic_stay(2, death=datetime(2150, 3, 1))  # by date alone: until the end of the day
    tiny.septic_stay(3, dod=datetime(2150, 3, 1), hours=40)
    tiny.septic_stay(4, death=ADMITTED - 1000 * hour)  # the donor of an organ
    tiny.septic_stay(5, dod=datetime(2150, 2, 1))  # an error
    tiny.septic_stay(6, died=True)
    tiny.tables["admissions"][-1] |= {"deathtime": None, "dischtime": ADMITTED + 13 * hour}
    episodes, report = build(tiny)
    assert episodes.stay_id.tolist() == [30_000_001 + 10 * n for n in (1, 2, 3, 5, 6)]
    assert episodes.length.tolist() == [3, 4, 4, 6, 4]
    assert episodes.died_90d.tolist() == [True, True, True, False, True]
    assert episodes.died_in_hospital.tolist() == [True, True, False, False, True]
    assert lines(report)["times"] == (1, 5)
    assert report.counts["stays"] == {
        "dates of death before ICU admission, taken as errors": 1,
        "deaths in hospital without a date of death": 1,
        "stays that begin after the death of the patient": 1,
    }
    assert report.counts["cohort"] == {"stays that end at death, before the unit was left": 4}
    assert report.notes == ()


def test_an_empty_date_of_death_is_said(build):
    tiny = Tiny()
    tiny.septic_stay(1, died=True)
    tiny.tables["admissions"][-1]["deathtime"] = None
    tiny.septic_stay(2)
    tiny.tables["admissions"][-1]["deathtime"] = ADMITTED + timedelta(hours=5)
    tiny.tables["admissions"][-1]["hospital_expire_flag"] = 0
    episodes, report = build(tiny)
    assert episodes.died_in_hospital.tolist() == episodes.died_90d.tolist() == [True, True]
    (note,) = report.notes
    assert note.startswith("No patient has a date of death (dod)") and report.manifest["notes"] == [
        note
    ]
    told = "deaths in hospital that hospital_expire_flag does not tell"
    assert report.counts["stays"][told] == 1


def test_organ_failure_before_the_unit_is_counted(build):
    tiny = Tiny()
    stay = tiny.stay(1)
    for hour in (-20, *range(24)):
        tiny.chart(stay, hour, 220045, 90)
    tiny.pressor(stay, -20, -18, NOREPINEPHRINE, 0.5)
    tiny.antibiotic(stay, 2)
    tiny.culture(stay, 1)
    _, report = build(tiny)
    early = "septic stays whose SOFA first reached 2 before ICU admission"
    assert report.counts["cohort"] == {early: 1}
