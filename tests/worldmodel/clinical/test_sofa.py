"""SOFA, organ by organ, at every boundary."""

import jax.numpy as jnp
import numpy as np
import pytest

from worldmodel import schema
from worldmodel.clinical import sofa

WELL = {
    "pao2": 100.0, "fio2": 21.0, "platelet": 200.0, "bilirubin_total": 0.5, "meanbp": 80.0,
    "gcs_eye": 4.0, "gcs_verbal": 5.0, "gcs_motor": 6.0, "creatinine": 0.8,
}  # fmt: skip


def patient(**changes):
    dynamic = np.zeros(39, np.float32)
    for name, value in {**WELL, **changes}.items():
        dynamic[schema.INDEX[name]] = value
    return jnp.asarray(dynamic)


def standard(ventilated=False, dose=0.0, urine=2000.0, **changes):
    return sofa.standard(
        patient(**changes), ventilated=ventilated, vasopressor_dose=dose, urine_24h=urine
    )


def reference(ventilated=False, level=0, urine=2000.0, **changes):
    return sofa.reference(
        patient(**changes), ventilated=ventilated, vasopressor_level=level, urine_before=urine
    )


BOTH = pytest.mark.parametrize("score", [standard, reference])


@BOTH
def test_a_well_patient_scores_nothing(score):
    assert score().total == 0


@BOTH
@pytest.mark.parametrize(
    ("ratio", "breathing", "ventilated"),
    [
        (400, 0, 0),
        (399, 1, 1),
        (300, 1, 1),
        (299, 2, 2),
        (200, 2, 2),
        (199, 2, 3),  # 3 and 4 need a ventilator
        (100, 2, 3),
        (99, 2, 4),
    ],
)
def test_respiratory(score, ratio, breathing, ventilated):
    # FiO2 of 50%: P/F = 2 PaO2.
    pao2 = ratio / 2
    assert score(pao2=pao2, fio2=50.0).respiratory == breathing
    assert score(ventilated=True, pao2=pao2, fio2=50.0).respiratory == ventilated


@BOTH
def test_room_air_is_the_least_oxygen(score):
    # 84 / 0.21 = 400 is no point, although 84 / 0.10 would be no point either: so use 83.
    assert score(pao2=84.1, fio2=10.0).respiratory == 0
    assert score(pao2=83.9, fio2=10.0).respiratory == 1


@BOTH
@pytest.mark.parametrize(
    ("platelet", "points"),
    [(150, 0), (149.9, 1), (100, 1), (99.9, 2), (50, 2), (49.9, 3), (20, 3), (19.9, 4)],
)
def test_coagulation(score, platelet, points):
    assert score(platelet=platelet).coagulation == points


@BOTH
@pytest.mark.parametrize(
    ("bilirubin", "points"),
    [(1.19, 0), (1.2, 1), (1.99, 1), (2.0, 2), (5.99, 2), (6.0, 3), (11.99, 3), (12.0, 4)],
)
def test_liver(score, bilirubin, points):
    assert score(bilirubin_total=bilirubin).liver == points


@BOTH
@pytest.mark.parametrize(
    ("eye", "verbal", "motor", "points"),
    [
        (4, 5, 6, 0),  # 15
        (4, 4, 6, 1),  # 14
        (3, 4, 6, 1),  # 13
        (3, 3, 6, 2),  # 12
        (2, 2, 6, 2),  # 10
        (2, 2, 5, 3),  # 9
        (1, 1, 4, 3),  # 6
        (1, 1, 3, 4),  # 5
        (1, 1, 1, 4),  # 3
    ],
)
def test_cns(score, eye, verbal, motor, points):
    assert score(gcs_eye=eye, gcs_verbal=verbal, gcs_motor=motor).cns == points


@BOTH
@pytest.mark.parametrize(
    ("creatinine", "urine", "points"),
    [
        (1.19, 2000, 0),
        (1.2, 2000, 1),
        (1.99, 2000, 1),
        (2.0, 2000, 2),
        (3.49, 2000, 2),
        (3.5, 2000, 3),
        (4.99, 2000, 3),
        (5.0, 2000, 4),
        (0.8, 500, 0),
        (0.8, 499.9, 3),
        (0.8, 200, 3),
        (0.8, 199.9, 4),
        (0.8, 0, 4),
        (5.0, 499.9, 4),  # the worse of the two
        (1.2, 499.9, 3),
    ],
)
def test_renal(score, creatinine, urine, points):
    assert score(creatinine=creatinine, urine=urine).renal == points


@pytest.mark.parametrize(
    ("meanbp", "dose", "points"),
    [
        (70.0, 0.0, 0),
        (69.9, 0.0, 1),
        (70.0, 1e-6, 3),
        (69.9, 0.1, 3),
        (70.0, 0.1001, 4),
        (40.0, 2.0, 4),
    ],
)
def test_cardiovascular_by_dose(meanbp, dose, points):
    assert standard(meanbp=meanbp, dose=dose).cardiovascular == points


@pytest.mark.parametrize(
    ("meanbp", "level", "points"),
    [(70.0, 0, 0), (69.9, 0, 1), (70.0, 1, 1), (69.9, 1, 2), (70.0, 3, 3), (69.9, 3, 4),
     (70.0, 4, 4), (69.9, 4, 4)],
)  # fmt: skip
def test_cardiovascular_by_level(meanbp, level, points):
    assert reference(meanbp=meanbp, level=level).cardiovascular == points


def test_total_is_the_sum_of_organs_and_at_most_24():
    worst = standard(
        ventilated=True, dose=1.0, urine=0.0, pao2=40.0, fio2=100.0, platelet=10.0,
        bilirubin_total=20.0, gcs_eye=1.0, gcs_verbal=1.0, gcs_motor=1.0,
    )  # fmt: skip
    assert [float(points) for points in worst] == [4] * 6
    assert worst.total == 24
    # 1 (platelets) + 1 (bilirubin) + 1 (MAP) + 3 (urine)
    assert standard(platelet=120, bilirubin_total=1.5, meanbp=60, urine=300).total == 6


def test_scores_are_elementwise():
    batch = jnp.stack([patient(), patient(platelet=60.0)])[:, None]
    score = sofa.standard(
        batch,
        ventilated=jnp.zeros((2, 1), bool),
        vasopressor_dose=jnp.array([[0.0], [0.2]]),
        urine_24h=jnp.full((2, 1), 900.0),
    )
    np.testing.assert_array_equal(score.total, [[0], [6]])


def test_urine_24h_by_hand():
    # Six 4-hour steps make 24 h; earlier ones are scaled: 100 * 6 = 600, 300 * 3 = 900, ...
    urine = jnp.array([100.0, 200, 300, 0, 0, 0, 60, 40])
    got = sofa.urine_24h(urine)
    np.testing.assert_allclose(got, [600, 900, 1200, 900, 720, 600, 560, 400], rtol=1e-6)
    plain = sofa.urine_24h(urine, scaled=False)
    np.testing.assert_allclose(plain, [100, 300, 600, 600, 600, 600, 560, 400], rtol=1e-6)


def test_urine_24h_follows_the_step_length():
    # Two-hour steps: twelve make 24 h.
    got = sofa.urine_24h(jnp.full((1, 14), 10.0), step_hours=2.0)
    np.testing.assert_allclose(got, np.full((1, 14), 120.0), rtol=1e-6)
    # Eight-hour steps: three.
    got = sofa.urine_24h(jnp.array([1.0, 2, 3, 4]), step_hours=8.0)
    np.testing.assert_allclose(got, [3, 4.5, 6, 9], rtol=1e-6)
