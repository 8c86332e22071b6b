"""A run that is killed at any moment goes on as if nothing had been; a full disk harms nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.train.loop.checkpoints import Checkpoints
from worldmodel.errors import InputError


def state_of(value):
    return {"w": jnp.full((4, 3), value, jnp.bfloat16), "count": (jnp.int32(7), jnp.ones(2))}


def test_what_was_saved_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest() is None
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoints.restore(state_of(0))
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), {"version": step}, {"lagged": jnp.arange(step)})
    again = Checkpoints(tmp_path / "run")
    assert again.latest() == 3
    found = again.restore(state_of(0), arrays={"lagged": jnp.zeros(3, jnp.int32)})
    jax.tree.map(np.testing.assert_array_equal, found.state, state_of(3))
    assert found.state["w"].dtype == jnp.bfloat16
    assert found.extra == {"version": 3}
    np.testing.assert_array_equal(found.arrays["lagged"], [0, 1, 2])
    before = again.restore(state_of(0), step=2)
    assert before.extra == {"version": 2} and before.arrays is None
    assert sorted(path.name for path in (tmp_path / "run/steps").iterdir()) == ["2", "3"]


def test_another_model_and_another_run_are_refused(tmp_path):
    Checkpoints(tmp_path, fingerprint={"seed": 0, "rates": (1, 2)}).save(1, state_of(1), {})
    again = Checkpoints(tmp_path, fingerprint={"rates": (1, 2), "seed": 0})
    with pytest.raises(InputError, match=r"state: w has shape \(4, 3\), expected \(5, 3\)"):
        again.restore(state_of(0) | {"w": jnp.zeros((5, 3))})
    with pytest.raises(InputError, match="another 'seed' \\(0, now 1\\)"):
        Checkpoints(tmp_path, fingerprint={"seed": 1, "rates": (1, 2)})


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1), {})
    checkpoints.save(2, state_of(2), {})
    checkpoints.close()
    shutil.rmtree(tmp_path / "steps/2/state/ocdbt.process_0")
    shutil.rmtree(tmp_path / "steps/2/state/d")
    with pytest.raises(InputError, match=r"steps/2: not a readable checkpoint"):
        Checkpoints(tmp_path).restore(state_of(0))
    shutil.rmtree(tmp_path / "steps/2")
    assert float(Checkpoints(tmp_path).restore(state_of(0)).state["w"][0, 0]) == 1


def test_what_is_not_finite_is_never_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1), {})
    with pytest.raises(InputError, match=r"step 2: .* not finite .*; step 1 is still good"):
        checkpoints.save(2, state_of(np.nan), {})
    assert checkpoints.latest() == 1


ON_A_SMALL_DISK = """
import resource, sys
import jax.numpy as jnp
from policy.train.loop.checkpoints import Checkpoints
from worldmodel.errors import InputError

checkpoints = Checkpoints(sys.argv[1])
state = {"w": jnp.arange(100_000.0)}
checkpoints.save(1, state, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, {"w": state["w"] + 0.1}, {})
except InputError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert float(checkpoints.restore(state).state["w"][5]) == 5
again = Checkpoints(sys.argv[1])
assert again.latest() == 1
again.save(2, {"w": state["w"] + 1}, {})
assert float(again.restore(state).state["w"][5]) == 6
"""


def test_a_write_that_fails(tmp_path):
    """The system refuses to write more than 20 kB into a file, as it refuses to fill a disk."""
    done = run_python(ON_A_SMALL_DISK, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "cannot save step 2" in done.stdout and "File too large" in done.stdout
    assert "step 1 is still good; make room on the disk and start again" in done.stdout
    assert len(done.stdout.splitlines()) == 1


RUN = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from itertools import count, islice
from policy import qwen3
from policy.train.loop.checkpoints import Checkpoints
from policy.train.loop.learner import Learner
from policy.train.loop.optimizer import LearnerConfig
from policy.train.losses import Summed
from policy.train.loop.metrics import MetricsLog

config = LearnerConfig(max_steps=12, learning_rate=1e-2, warmup_steps=0,
                       gradient_accumulation_steps=2, logging_steps=1, save_steps=2,
                       moment_dtype="bfloat16", param_dtype="bfloat16")


def loss(model, number):
    total = jnp.sum(jnp.square(model.embed_tokens.embedding[...]) * jnp.cos(number))
    return Summed(total, jnp.float32(1), {"number": number})


folder = Path(sys.argv[2])
learner = Learner(qwen3.load(sys.argv[1]), loss, config)
checkpoints = Checkpoints(folder / "checkpoints", fingerprint={"steps": 12})
extra = learner.resume(checkpoints)
assert extra is None or extra == {"drawn": learner.consumed}
with MetricsLog(folder, resume_at=learner.step) as log:
    numbers = (np.float32(n) for n in count(learner.consumed))
    learner.run(numbers, report=log.report, checkpoints=checkpoints,
                extra=lambda: {"drawn": learner.consumed})
np.savez(folder / "end.npz", *(np.asarray(x.astype(jnp.float32)) for x in
                               jax.tree.leaves(learner.state)))
"""


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
    )


def environment():
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def killed(tmp_path, model, moment):
    """A run that gets SIGKILL at a moment; False if it was over before."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(model), str(tmp_path)], env=environment()
    )
    try:
        while process.poll() is None and not moment():
            time.sleep(0.0005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process.returncode == -signal.SIGKILL


def test_a_killed_run_goes_on_to_the_same_end(tmp_path, untaught):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = run_python(RUN, untaught, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    steps = tmp_path / "killed/checkpoints/steps"

    def saving(after):
        """In the middle of writing a checkpoint that comes after so many others."""
        names = [path.name for path in steps.iterdir()] if steps.exists() else []
        whole = [int(name) for name in names if name.isdigit()]
        return max(whole, default=0) >= after and len(whole) < len(names)

    def later():
        return saving(4) and (time.sleep(random.uniform(0, 0.1)) or True)

    assert killed(tmp_path / "killed", untaught, lambda: saving(0))
    assert killed(tmp_path / "killed", untaught, later)
    again = run_python(RUN, untaught, tmp_path / "killed")
    assert again.returncode == 0, again.stderr

    one, other = (np.load(tmp_path / name / "end.npz") for name in ("whole", "killed"))
    for name in one:
        assert one[name].tobytes() == other[name].tobytes()
    one, other = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed"))
    assert one == other
    assert [json.loads(line)["step"] for line in one.splitlines()] == list(range(1, 13))
