"""Where commands write: one run at a time, nothing left of killed ones, failures in one line."""

import builtins
import json
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import typer

from sepsis_jax import __main__, cli, console
from sepsis_jax.pipelines.audit import AuditConfig
from sepsis_jax.runs import claimed, run_folder
from tests.sepsis_jax.command_line import call, leftovers, refuse
from worldmodel.configuration import from_mapping, resolve_config
from worldmodel.errors import InputError
from worldmodel.files import atomic_file, atomic_folder
from worldmodel.models.fitting import FitConfig

HOLDER = """
import sys, time
from pathlib import Path
from sepsis_jax.runs import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to `out`."""
    words = [sys.executable, "-c", HOLDER, tmp_path / "out"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


def test_two_runs_exclude_each_other_and_a_killed_one_does_not(holder, tmp_path, capsys):
    words = ("cohort", "synthetic", "--patients", 10, "--out", tmp_path / "out")
    refuse(call(capsys, *words), "out: another run is writing there")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claimed(tmp_path / "out"):
        pass
    assert leftovers(tmp_path) == []


def test_parts_of_a_folder_exclude_only_the_whole_and_themselves(tmp_path):
    out = tmp_path / "out"
    with claimed(out, part="0-of-2"):
        with claimed(out, part="1-of-2"):
            pass
        for part in ("0-of-2", None):
            with pytest.raises(InputError, match="another run"), claimed(out, part=part):
                pass
    another = pytest.raises(InputError, match="another run")
    with claimed(out), another, claimed(out, part="1-of-2"):
        pass
    assert leftovers(tmp_path) == []


def test_what_killed_runs_left_is_removed(tmp_path):
    for name in (".out.abcd1234", ".out.work.abcd1234", ".out.abcd1234.old", ".other.abcd1234"):
        (tmp_path / name).mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".manifest.17-tmp.json").touch()
    (tmp_path / "out" / ".hidden.json").touch()
    with claimed(tmp_path / "out"):
        pass
    assert leftovers(tmp_path) == [".other.abcd1234", "out"]
    assert leftovers(tmp_path / "out") == [".hidden.json"]


def test_the_older_folder_comes_back_after_a_kill_between_renames(tmp_path):
    (tmp_path / ".out.abcd1234.old").mkdir()
    (tmp_path / ".out.abcd1234.old" / "result").touch()
    with claimed(tmp_path / "out"):
        pass
    assert leftovers(tmp_path) == ["out"] and leftovers(tmp_path / "out") == ["result"]


def test_temporary_names_are_those_that_are_swept_up(tmp_path):
    """Of the real writers, stopped where a kill would stop them."""
    out = tmp_path / "out"
    with pytest.raises(InterruptedError), atomic_folder(out):
        (half,) = leftovers(tmp_path)
        raise InterruptedError
    (tmp_path / half).mkdir()  # as a kill leaves it
    with claimed(out):
        assert leftovers(tmp_path) == [".out.lock"]
    out.mkdir()
    with atomic_file(out / "table.csv") as temporary:
        temporary.touch()
        with claimed(out):
            pass
        assert not temporary.exists()
        temporary.touch()
    assert leftovers(out) == ["table.csv"]


def test_a_refused_run_leaves_nothing_and_an_empty_one_can_be_mended(tmp_path):
    out, keeps = tmp_path / "out", ("checkpoints",)

    def run(request, resume=False):
        return run_folder(out, "test", request, resume=resume, keeps=keeps)

    with pytest.raises(InputError, match="broken"), run({"a": 1}):
        (out / "cache").mkdir()
        raise InputError("broken")
    assert leftovers(tmp_path) == []
    with pytest.raises(RuntimeError), run({"a": 1}):
        raise RuntimeError("as a kill")
    with run({"a": 2}):  # the mended command
        (out / "checkpoints").mkdir()
        (out / "checkpoints" / "1").touch()
    assert json.loads((out / "manifest.json").read_text())["request"] == {"a": 2}
    with pytest.raises(InputError, match="begun with another a"), run({"a": 3}, resume=True):
        pass
    with pytest.raises(InputError, match="resume it"), run({"a": 2}):
        pass
    with pytest.raises(InputError, match="late"), run({"a": 2}, resume=True):
        raise InputError("late")
    assert leftovers(out) == ["checkpoints", "manifest.json"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (OSError(122, "Disk quota exceeded", "x.csv"), "x.csv: the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device"), "disk is full"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes"), "not enough memory"),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
    ],
)
def test_failures_of_the_machine_are_one_line(error, words, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("sepsis_jax.pipelines.episodes.make_synthetic_cohort", fail)
    refuse(call(capsys, "cohort", "synthetic", "--out", tmp_path / "out"), words)
    assert leftovers(tmp_path) == []


def test_a_full_disk_names_what_was_written(tmp_path, monkeypatch):
    """A limit on the size of files fails in the same place as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with (
            pytest.raises(OSError, match=r"out$|out'") as found,
            atomic_folder(tmp_path / "out") as folder,
        ):
            (folder / "table").write_bytes(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the disk is full" in cli._failure(found.value)
    assert leftovers(tmp_path) == []


def test_faults_of_the_software_keep_their_traceback(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("sepsis_jax.pipelines.episodes.make_synthetic_cohort", fail)
    with pytest.raises(ZeroDivisionError):
        call(capsys, "cohort", "synthetic", "--out", tmp_path / "out")


@pytest.mark.parametrize("hint", ["", "the same command goes on"])
def test_ctrl_c_is_one_line(hint, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt(*([hint] if hint else []))

    monkeypatch.setattr("sepsis_jax.pipelines.episodes.make_synthetic_cohort", fail)
    result = call(capsys, "cohort", "synthetic", "--out", tmp_path / "out")
    assert result.status == 130
    assert result.err == f"sepsis-jax: interrupted{'; ' if hint else ''}{hint}\n"
    assert leftovers(tmp_path) == []


def test_ctrl_c_waits_for_no_timer(tmp_path, capsys, monkeypatch):
    timer = threading.Timer(3600, lambda: None)

    def fail(*_, **__):
        timer.start()
        raise KeyboardInterrupt

    monkeypatch.setattr("sepsis_jax.pipelines.episodes.make_synthetic_cohort", fail)
    assert call(capsys, "cohort", "synthetic", "--out", tmp_path / "out").status == 130
    timer.join(timeout=30)
    assert not timer.is_alive()


def test_ctrl_c_while_all_is_imported(monkeypatch, capsys):
    imported = builtins.__import__

    def fail(name, *arguments, **options):
        if name == "sepsis_jax" and "cli" in (arguments[2] or ()):
            raise KeyboardInterrupt
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 130 and capsys.readouterr().err == "sepsis-jax: interrupted\n"


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [(signal.SIGINT, 130, "sepsis-jax: interrupted\n"), (signal.SIGTERM, 143, "")],
)
def test_ctrl_c_of_a_terminal_and_the_end_of_a_scheduler(
    sent, status, said, heeded_ctrl_c, tmp_path
):
    words = [sys.executable, "-m", "sepsis_jax", "cohort", "synthetic", "--patients", "60000",
             "--out", tmp_path / "out"]  # fmt: skip
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / ".out.lock").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (status, said)
    assert leftovers(tmp_path) == []


def test_json_stands_alone_and_has_no_nan(capsys):
    console.print_json({"a": float("nan"), "b": [float("inf"), (1.5, None)]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, [1.5, None]]}


def test_a_seed_of_zero_is_a_seed():
    config = AuditConfig(seed=7)
    assert console.with_seed(config, 0).seed == 0
    assert console.with_seed(config, None).seed == 7


@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("1E3", 1000.0), ("-2.5e+1", None)])
def test_numbers_without_a_point_are_numbers(text, value, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(f"learning_rate: {text}\n")
    if value is None:  # read, and refused as a rate
        with pytest.raises(InputError, match=r"learning_rate: got -25\.0"):
            resolve_config(FitConfig, file, None, source="x")
    else:
        assert resolve_config(FitConfig, file, None, source="x").learning_rate == value
        assert (
            resolve_config(FitConfig, None, [f"learning_rate={text}"], source="x").learning_rate
            == value
        )


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_no_generator_takes_such_a_seed(seed):
    with pytest.raises(InputError, match=f"seed: got {seed}, expected 0 to 4294967295"):
        from_mapping(AuditConfig, {"seed": seed}, source="x")


def _options(command, path=()):
    for name, inner in getattr(command, "commands", {}).items():
        yield from _options(inner, (*path, name))
    for option in command.params:
        yield " ".join(path), option


def test_letters_mean_the_same_everywhere():
    found = {}
    for _, option in _options(typer.main.get_command(cli.app)):
        for text in option.opts:
            if len(text) == 2:
                found.setdefault(text, set()).add(option.opts[0])
    assert found == {"-o": {"--set"}}
