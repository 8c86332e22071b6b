"""The wheel: whole, and of use outside a checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def command(*words, cwd, **settings):
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONSAFEPATH": "1", **settings},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked(*folders):
    names = command("git", "ls-files", *folders, cwd=ROOT).splitlines()
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in command("git", "ls-files", cwd=ROOT).splitlines():
        file = ROOT / name
        if file.is_symlink() or file.is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if file.is_symlink():
                (source / name).symlink_to(file.readlink())
            else:
                (source / name).write_bytes(file.read_bytes())
    command(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
        "--wheel-dir", out, source, cwd=out,
    )  # fmt: skip
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {name for name in tracked("sepsis_jax", "worldmodel", "policy")}
    wanted |= {f"sepsis_jax/{name}" for name in tracked("configs")}
    assert wanted <= held
    code = {name for name in held if ".dist-info/" not in name}
    assert code == wanted


def test_the_unpacked_wheel_works_outside_a_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    run = (sys.executable, "-m", "sepsis_jax")
    where = {"PYTHONPATH": str(tmp_path / "site")}
    script = "import sepsis_jax, pathlib; print(pathlib.Path(sepsis_jax.__file__).parents[1])"
    assert command(sys.executable, "-c", script, cwd=tmp_path, **where).strip() == str(
        tmp_path / "site"
    )
    assert "configs" in command(*run, "init", "project", cwd=tmp_path, **where)
    plan = command(*run, "study", "configs/demo.yaml", "--dry-run", cwd=tmp_path / "project",
                   **where)  # fmt: skip
    assert "language_model" in plan
    command(*run, "cohort", "synthetic", "--patients", 20, "--out", "cohort", cwd=tmp_path,
            **where)  # fmt: skip
    assert (tmp_path / "cohort" / "episodes.parquet").exists()


@pytest.mark.slow
def test_the_demo_runs_from_a_wheel_in_a_clean_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    command(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel,
            cwd=tmp_path)  # fmt: skip
    program = tmp_path / "env" / "bin" / "sepsis-jax"
    command(program, "demo", "--patients", 1000, "--out", "runs/demo", cwd=tmp_path)
    assert (tmp_path / "runs" / "demo" / "report.html").exists()
