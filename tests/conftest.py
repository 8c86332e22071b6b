"""Fixtures that all tests share."""

import gc
import json
import os
import signal
import sys
from collections import Counter
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

from sepsis_jax.compiled_programs import cache_folder, machine

# XLA's newer code generator takes nearly twice as long to compile small programs, and they run no
# faster. A program that is cut into parts, to be compiled by several threads, takes a fifth more of
# processors that the workers keep busy anyway. Optimizing more than level 1 takes longer than the
# tests of tiny models gain from it. The flags are of the version that is tested; XLA aborts at
# flags that it does not know. Workers and other processes find them in their environment.
FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_optimization_level=1"
)
if version("jax").startswith("0.10.") and FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()


# Private, since commands keep their programs there only if nobody else can write to it.
cache_folder().parent.mkdir(parents=True, exist_ok=True)
cache_folder().mkdir(mode=0o700, exist_ok=True)
# Of JAX here and, as it is in the environment, of every process that a test starts: what one
# module, worker, process or run compiled, the others read from the disk.
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(cache_folder() / f"compiled-{machine()}"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "HF_HUB_OFFLINE": "1",  # nothing is asked of a hub, nor told to it
}
assert "jax" not in sys.modules, "too late for JAX to read its settings"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

import tests.shapes  # noqa: E402

# Arrays are checked against their annotations in all that is imported from here on.
jaxtyping.install_import_hook(
    ["worldmodel", "policy", "sepsis_jax"],
    f"{tests.shapes.__name__}.{tests.shapes.arrays_checked.__name__}",
)

from tests.shared import made_once  # noqa: E402
from worldmodel.scaling import Scaler  # noqa: E402

# Most tests compile much and compute little. Those of these files and folders compute much, or
# measure it, and their programs are optimized as a user's are.
OPTIMIZED = (
    "tests/policy/agent/test_served.py",
    "tests/policy/offline/test_training.py",
    "tests/policy/test_ppo.py",
    "tests/policy/serving/",
    "tests/policy/train/test_memory.py",
    "tests/policy/train/test_rl_trainer.py",
    "tests/policy/train/test_taught_qwen3.py",
    "tests/sepsis_jax/benchmark/",
    "tests/sepsis_jax/test_llm_",
    "tests/worldmodel/envs/test_gumbel_max.py",
    "tests/worldmodel/envs/test_icu_sepsis.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Sets what the compiler spends on the programs of a test and of the processes it starts."""
    little = not item.nodeid.startswith(OPTIMIZED)
    jax.config.update("jax_disable_most_optimizations", little)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(little))


# Seconds per file, as `make durations` writes them.
DURATIONS = Path(__file__).with_name("durations.txt")


FAST = 8.0


def durations() -> dict[str, float]:
    """Seconds of each file of tests."""
    lines = (line.split() for line in DURATIONS.read_text().splitlines() if line[0] != "#")
    return {file: float(seconds) for seconds, file in lines}


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="only files of few seconds")
    parser.addoption("--write-durations", action="store_true", help="to tests/durations.txt")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Longest files first, so that workers end together; with `--fast` those of few seconds."""
    seconds = durations()
    cost = {item: seconds.get(item.nodeid.split("::")[0], 0.0) for item in items}
    if config.getoption("--fast"):
        dropped = [item for item in items if cost[item] > FAST]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if cost[item] <= FAST]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -cost[item])


class Stopwatch:
    """Sums seconds per file over all workers; files that did not run keep theirs."""

    def __init__(self):
        self.seconds = Counter()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid.split("::")[0]] += report.duration

    def pytest_sessionfinish(self):
        known = Counter(durations() | self.seconds)
        rows = [f"{n:7.1f} {file}" for file, n in known.most_common() if Path(file).exists()]
        DURATIONS.write_text("\n".join([f"# {os.cpu_count()} CPUs, {date.today()}", *rows, ""]))


def pytest_configure(config):
    # Tracing makes millions of small objects that live on; looking for circles among them costs.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    if config.getoption("--write-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Stopwatch())


# Each program keeps mappings of memory. XLA aborts the process at Linux's limit
# (`vm.max_map_count`, 65,530), wherever it happens to be.
MAPPINGS = 25_000


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Programs are kept from module to module until there are too many."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def unit_scaler():
    """A scaler that leaves everything but the logarithm of urine alone."""
    return Scaler(
        mean=jnp.zeros(39), std=jnp.ones(39), static_mean=jnp.zeros(3), static_std=jnp.ones(3)
    )


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def heeded_ctrl_c():
    """Processes that the test starts heed SIGINT, which jobs in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def taught(tmp_path_factory, worker_id):
    """A tiny Qwen3 that holds short dialogues: its folder, and the reports of its training."""
    from policy.testing.taught_qwen3 import taught_tiny
    from policy.train.loop.metrics import Report

    def make(folder):
        reports = []
        taught_tiny(folder / "tiny", report=reports.append)
        (folder / "reports.json").write_text(json.dumps([asdict(one) for one in reports]))

    folder = made_once("taught", make, tmp_path_factory, worker_id)
    reports = [Report(**one) for one in json.loads((folder / "reports.json").read_text())]
    return folder / "tiny", reports


@pytest.fixture(scope="session")
def first_cohort(tmp_path_factory, worker_id):
    """A cohort made by the command."""
    from tests.sepsis_jax.command_line import finish

    def make(folder):
        finish("cohort", "synthetic", "--patients", 60, "--out", folder / "cohort")

    return made_once("cohort", make, tmp_path_factory, worker_id) / "cohort"


@pytest.fixture(scope="session")
def first_model(first_cohort, tmp_path_factory, worker_id):
    """A model made by the command, of the reference variant, in the published shape."""
    from tests.sepsis_jax.command_line import FAST, finish

    def make(folder):
        out = folder / "model"
        finish("world-model", "train", "--episodes", first_cohort, "--out", out, *FAST)

    return made_once("model", make, tmp_path_factory, worker_id) / "model"
