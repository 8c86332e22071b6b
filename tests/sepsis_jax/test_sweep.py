"""`sepsis-jax sweep`: what it writes, and that no interruption, host or device changes a byte."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from policy.checkpoint import load_policy, save_policy
from policy.clinician_models import MLP
from sepsis_jax.pipelines import sweep as pipeline
from sepsis_jax.pipelines.sweep_folder import SweepFolder
from sepsis_jax.pipelines.sweep_request import SweepOptions, load_sweep
from tests.sepsis_jax.command_line import call, finish, leftovers, refuse
from worldmodel import schema
from worldmodel.episode_files import load_episodes, load_scaler
from worldmodel.models.checkpoint import load_world_model, save_world_model
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import rollout

# 9 stays in blocks of 2 starts under 52 plans, and 16 starts under the policy.
REQUEST = (
    "--plan", "constant", "--plan", "deviations", "--plan", "clinician", "--plan", "early=2,1;1,1",
    "--steps", "0,3,60", "--horizon", 3, "--samples", 4,
    "--set", "patients=9", "--set", "block=416", "--set", "task=104",
)  # fmt: skip
KEY = jax.random.key(0)
COMPUTED = ("manifest.json", "parts", "summary.csv", "sweep.png")


# Untrained: the reference variant answers to treatment as it is initialised.
SMALL = ModelConfig(variant="reference", hidden=8, layers=1, embed=4, head=4)


def untrained(cohort, name, members):
    world_model = init_world_model(
        jax.random.key(members), load_scaler(cohort), SMALL, members=members
    )
    return save_world_model(world_model, cohort.with_name(name))


@pytest.fixture(scope="module")
def ensemble(cohort):
    return untrained(cohort, "ensemble", 2)


@pytest.fixture(scope="module")
def clone(cohort):
    return save_policy(MLP.initial(KEY, load_scaler(cohort), 8), cohort.with_name("clone"))


@pytest.fixture(scope="module")
def arguments(cohort, ensemble, clone):
    """All but `--out`."""
    folders = ("--model", ensemble, "--episodes", cohort, "--behavior", clone)
    return ("sweep", *folders, "--policy", f"cloned={clone}", *REQUEST)


@pytest.fixture(scope="module")
def swept(cohort, arguments):
    out = cohort.with_name("swept")
    finish(*arguments, "--out", out)
    return out


@pytest.fixture
def run(capsys):
    return lambda *arguments: call(capsys, *arguments)


def contents(folder):
    """Digest of every file; the revision of the code, which is recorded, may change meanwhile."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        raw = path.read_bytes()
        if path.name == "manifest.json":
            raw = json.dumps({**json.loads(raw), "revision": None}).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(raw).hexdigest()
    return found


# What it writes


def test_help_shows_an_example(run):
    result = run("sweep", "--help")
    assert result.status == 0 and "Example: sepsis-jax sweep" in " ".join(result.out.split())


def test_the_folder(swept, cohort):
    assert leftovers(swept) == list(COMPUTED)
    manifest = json.loads((swept / "manifest.json").read_text())
    starts = manifest["groups"]["starts"]
    length = np.asarray(load_episodes(cohort).length)[:9]
    assert starts == 9 + (length > 3).sum()
    assert manifest["groups"]["skipped_starts"] == 27 - starts
    assert manifest["groups"]["plans"][25 + 6]["actions"] == "1,1;recorded;recorded"
    assert manifest["groups"]["branch_steps"] == starts * 53 * 4 * 3
    assert all(len(manifest["inputs"][name]) == 64 for name in ("episodes", "model", "behavior"))
    parts = leftovers(swept / "parts")
    assert len(parts) == manifest["groups"]["blocks"] == -(-starts // 2) + 1
    table = pd.read_parquet(swept / "parts")
    assert len(table) == starts * 53
    assert not table.duplicated(["stay_id", "step", "plan"]).any()


def test_a_row_is_what_a_rollout_comes_to(swept, cohort, ensemble):
    world_model, episodes = load_world_model(ensemble), load_episodes(cohort)
    table = pd.read_parquet(swept / "parts").set_index(["stay_id", "step", "plan"])
    stay = int(np.flatnonzero(np.asarray(episodes.length)[:9] > 3)[-1])
    start = start_history(world_model, episodes.select(np.array([stay])), 3)
    given = np.asarray(episodes.action)[stay, 3:6]
    plans = {
        "constant 4,2": [22] * 3,
        "deviation 0,4": [4, *given[1:]],
        "clinician": given,
        "early": [11, 6, 6],
    }
    found = rollout(world_model, KEY, start, np.stack([*plans.values()]), samples=4)
    mortality, reward = np.asarray(found.mortality[0]), np.asarray(found.total_reward[0])
    identity = int(episodes.stay_id[stay])
    for k, name in enumerate(plans):
        row = table.loc[(identity, 3, name)]
        meanbp = np.asarray(found.feature("meanbp"))[0, k]
        assert row["meanbp_mean"] == pytest.approx(meanbp[:, -1].mean(), rel=1e-4)
        assert row["map_below_65"] == pytest.approx((meanbp < 65).mean(), abs=1e-6)
        assert row["mortality_mean"] == pytest.approx(mortality[k].mean(), rel=1e-3)
        assert row["reward_mean"] == pytest.approx(reward[k].mean(), rel=1e-3)
        assert row["first_action"] == plans[name][0]
        assert row["recorded_action"] == given[0]
        assert row["meanbp_start"] == episodes.dynamic[stay, 3, schema.INDEX["meanbp"]]
        assert np.isnan(row["recorded_steps"]) == (name in ("constant 4,2", "early"))


def test_support_is_what_the_clone_says(swept, cohort, clone):
    episodes = load_episodes(cohort)
    probs = load_policy(clone).action_probs(episodes)
    table = pd.read_parquet(swept / "parts")
    plans = table[table["kind"] != "policy"]
    stay = np.searchsorted(np.asarray(episodes.stay_id), plans["stay_id"])
    want = probs[stay, plans["step"], plans["first_action"].astype(int)]
    np.testing.assert_allclose(plans["support"], want, rtol=1e-4)
    assert (table["supported"] == (table["support"] >= 0.01)).all()
    # A policy that draws: its samples begin differently, and the clone gives what it gives.
    drawn = table[table["kind"] == "policy"]
    assert drawn["first_action"].isna().any() and (drawn["support"] > 0).all()


def test_the_summary_is_the_mean_over_starts(swept):
    summary = pd.read_csv(swept / "summary.csv").set_index("plan")
    table = pd.read_parquet(swept / "parts")
    want = table.groupby("plan")[["reward_mean", "lactate_clearance", "supported"]].mean()
    for name in want:
        np.testing.assert_allclose(summary[name].loc[want.index], want[name].astype(float), 1e-4)
    assert list(summary.index)[-2:] == ["early", "cloned"]


def test_without_a_behavior_policy_support_is_empty(run, cohort, tmp_path):
    single = untrained(cohort, "single", 1)
    result = run("sweep", "--model", single, "--episodes", cohort, "--plan", "rest=0,0", "--out",
                 tmp_path / "out", "--samples", 2, "--horizon", 3, "--json")  # fmt: skip
    assert result.status == 0, result.err
    table = pd.read_parquet(tmp_path / "out" / "parts")
    assert table["support"].isna().all() and table["supported"].isna().all()
    assert table["mortality_disagreement"].isna().all()  # one member
    assert result.last_json["plans"][0]["supported"] is None
    assert result.last_json["missing"] == 0


def test_all_blocks_of_a_section_are_one_program(cohort, ensemble, clone):
    options = SweepOptions(plans=("constant",), steps=(0,), samples=4, horizon=3, patients=5,
                           block=200, task=50)  # fmt: skip
    sweep = load_sweep(cohort, ensemble, options, clone)
    rollouts = pipeline.RolloutCache(sweep)
    sizes = [pipeline.block_table(sweep, rollouts, block).num_rows for block in sweep.grid.blocks]
    assert sizes == [50, 50, 25]
    (sharded_rollout,) = rollouts._found.values()
    assert sharded_rollout.call._cache_size() == 1
    assert pipeline._jitted_probs._cache_size() >= 1


# Interruptions, hosts, devices

KILLED = """
import os, signal
from sepsis_jax import cli
replace = os.replace
def killed_before_the_fourth(source, target):
    if str(target).endswith("part-00003.parquet"):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target)
os.replace = killed_before_the_fourth
cli.main()
"""


def separately(code, arguments, devices):
    """Runs the command in a process of its own, on so many devices."""
    settings = {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def test_killed_and_resumed_it_is_the_same_to_the_byte_as_on_other_devices(
    run, swept, arguments, tmp_path
):
    out, whole = tmp_path / "out", tmp_path / "whole"
    code = "from sepsis_jax import cli; cli.main()"
    killed = separately(KILLED, [*arguments, "--out", out], 2)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(path.name for path in (out / "parts").iterdir())
    assert left[1:] == [f"part-0000{i}.parquet" for i in range(3)]
    assert left[0].startswith(".part-00003.")  # half-written
    resumed = separately(code, [*arguments, "--out", out, "--resume", "--json"], 2)
    assert resumed.returncode == 0, resumed.stderr
    blocks = len(leftovers(swept / "parts"))
    assert json.loads(resumed.stdout.splitlines()[-1])["blocks"] == blocks - 3
    at_once = separately(code, [*arguments, "--out", whole], 3)
    assert at_once.returncode == 0, at_once.stderr
    assert contents(out) == contents(whole)
    # One device alone may differ in the last bit, and says so.
    assert jax.local_device_count() == 1
    refuse(run(*arguments, "--out", out, "--resume"), "software.devices: several there, one here")
    several, one = (pd.read_parquet(folder / "parts") for folder in (out, swept))
    pd.testing.assert_frame_equal(several, one, rtol=1e-4, atol=1e-4)


def test_hosts_share_a_folder(run, swept, arguments, tmp_path):
    out = tmp_path / "out"
    first = run(*arguments, "--out", out, "--shard", "1/2", "--json")
    assert first.status == 0, first.err
    assert leftovers(out) == ["manifest.json", "parts"] and first.last_json["missing"] > 0
    assert first.last_json["plans"] == []
    again = run(*arguments, "--out", out, "--shard", "1/2")
    refuse(again, "holds blocks of this sweep", "--resume")
    second = run(*arguments, "--out", out, "--shard", "0/2", "--json")
    assert second.status == 0, second.err
    assert contents(out) == contents(swept)


def test_ctrl_c_says_how_to_go_on(run, swept, arguments, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = SweepFolder.write

    def interrupting(folder, block, table):
        if block.number == 2:
            raise KeyboardInterrupt
        write(folder, block, table)

    with monkeypatch.context() as patch:
        patch.setattr(SweepFolder, "write", interrupting)
        result = run(*arguments, "--out", out)
    assert result.status == 130
    assert result.err.count("\n") == 1 and "--resume" in result.err and str(out) in result.err
    assert leftovers(out / "parts") == ["part-00000.parquet", "part-00001.parquet"]
    assert run(*arguments, "--out", out, "--resume").status == 0
    assert contents(out) == contents(swept)


def test_what_is_there_is_not_done_again_unless_damaged(
    run, swept, arguments, tmp_path, monkeypatch
):
    out = shutil.copytree(swept, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "rollout_block", lambda *_: pytest.fail("played"))
        result = run(*arguments, "--out", out, "--resume", "--json")
    assert result.status == 0 and result.last_json["blocks"] == 0
    part = out / "parts" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-40])
    pq.write_table(
        pq.read_table(out / "parts" / "part-00002.parquet").slice(1),
        out / "parts" / "part-00002.parquet",
    )
    result = run(*arguments, "--out", out, "--resume", "--json")
    assert result.last_json["blocks"] == 2
    assert contents(out) == contents(swept)


def test_a_sweep_from_before_there_was_a_choice_of_kernels_goes_on(run, swept, arguments, tmp_path):
    out = shutil.copytree(swept, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["request"].pop("kernel") == "xla"  # what "auto" is on CPUs
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "parts" / "part-00001.parquet").unlink()
    assert run(*arguments, "--out", out, "--resume", "--kernel", "xla").status == 0
    assert (out / "parts" / "part-00001.parquet").exists()


# What it refuses


def test_an_existing_sweep_is_not_touched(run, swept, arguments):
    before = contents(swept)
    refuse(run(*arguments, "--out", swept), "holds blocks", "--resume")
    result = run(*arguments, "--out", swept, "--resume", "--samples", 8)
    refuse(result, "begun by another request", "request.samples: 4 there, 8 here")
    result = run(*arguments, "--out", swept, "--resume", "--seed", 1)
    refuse(result, "request.seed: 0 there, 1 here")
    assert contents(swept) == before


def test_a_strangers_folder_is_not_touched(run, arguments, tmp_path):
    (tmp_path / "thesis.txt").touch()
    refuse(run(*arguments, "--out", tmp_path), "exists")
    (tmp_path / "manifest.json").write_text("{}")
    refuse(run(*arguments, "--out", tmp_path), "not of a sweep")
    assert leftovers(tmp_path) == ["manifest.json", "thesis.txt"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--steps", "2,x"), ("--steps: got '2,x'",)),
        (("--steps", "900"), ("no stay reaches step 900",)),
        (("--steps", "0", "--every", "2"), ("--steps, --every: give one",)),
        (("--shard", "2/2"), ("shard: got '2/2'",)),
        (("--shard", "half"), ("shard: got 'half'",)),
        (("--samples", "3"), ("samples: got 3, expected a multiple of 2",)),
        (("--samples", "0"), ("--samples", "equal to 1")),
        (("--horizon", "0"), ("--horizon", "equal to 1")),
        (("--plan", "x=9,9"), ("level 9 is outside",)),
        (("--plan", "cloned=0,0"), ("policy cloned: a plan has that name",)),
        (("--policy", "clinician"), ("plan clinician",)),
        (("--policy", "nowhere"), ("policy 'nowhere'",)),
        (("--behavior", "nowhere"), ("nowhere: no such folder",)),
        (("--split", "holdout"), ("split: got 'holdout'",)),
        (("--set", "stays=[999999]"), ("stay 999999 is not in",)),
        (("--set", "features=[colour]"), ("features: got ['colour']",)),
        (("--set", "mode=quirky"), ("mode: got quirky",)),
        (("--set", "speed=9"), ("unknown setting 'speed'",)),
        (("--then", "7,7"), ("level 7 is outside",)),
    ],
)
def test_bad_requests_are_refused(run, arguments, tmp_path, extra, words):
    refuse(run(*arguments, "--out", tmp_path / "out", *extra), *words)
    assert leftovers(tmp_path) == []


def test_episodes_without_a_recorded_step_are_no_start(run, arguments, tmp_path):
    result = run(*arguments, "--out", tmp_path / "out", "--set", "stays=[1]", "--steps", "90")
    refuse(result, "no stay reaches step 90")
