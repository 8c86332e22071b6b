"""Every configuration of Qwen3-4B fits its card, and what does not fit says how it would."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from policy.qwen3.config import QWEN3_4B
from sepsis_jax.pipelines.llm.memory_plan import (
    FRACTION,
    Hardware,
    Start,
    plan_bc,
    plan_rl,
    plan_sft,
)
from sepsis_jax.pipelines.llm.setup import ModelOptions
from sepsis_jax.pipelines.llm.stages import StagesOptions
from tests.sepsis_jax.command_line import call, finish, refuse
from worldmodel.configuration import resolve_config
from worldmodel.errors import InputError

START = Start(QWEN3_4B)
CARDS = {
    "train_qwen3_4b_1xh200": ("H200", 1, 1),
    "train_qwen3_4b_v5e16": ("v5e", 16, 4),
    "train_qwen3_4b_v5p64": ("v5p", 64, 16),
}


def settings(name, *changes):
    return resolve_config(StagesOptions, Path(f"configs/{name}.yaml"), list(changes), source="test")


def test_every_configuration_of_the_real_model_has_a_card():
    assert {path.stem for path in Path("configs").glob("*qwen3_4b*")} == {*CARDS}


@pytest.mark.parametrize("name", CARDS)
def test_every_configuration_fits_its_card(name, monkeypatch):
    monkeypatch.delenv(FRACTION, raising=False)
    options, hardware = settings(name), Hardware.of(*CARDS[name])
    for plan in (
        plan_sft(options.sft, START, hardware),
        plan_bc(options.bc, START, hardware),
        plan_rl(options.rl, START, hardware),
    ):
        plan.check()
        assert plan.budget.peak > 2**30
    served = plan_rl(options.rl, START, hardware, embedded=False).budget
    assert "sampling" not in served.phases and "sampler's weights" not in served.kept


def test_what_does_not_fit_names_the_setting_to_change():
    free = settings("train_qwen3_4b_1xh200", "rl.runner.cache_tokens=0")
    hardware = Hardware.of("H200", 1, 1)
    plan = plan_rl(free.rl, START, hardware)
    assert plan.budget.phases["sampling"]["key-value cache"] == 256 * 9216 * 147_456
    with pytest.raises(InputError, match=r"rl.runner.concurrency: 256 -> (\d+)$") as refused:
        plan.check()
    fits = int(str(refused.value).rsplit(" ", 1)[1])
    runner = replace(free.rl.runner, concurrency=fits)
    plan_rl(replace(free.rl, runner=runner), START, hardware).check()
    runner = replace(free.rl.runner, concurrency=2 * fits)
    with pytest.raises(InputError, match="concurrency"):
        plan_rl(replace(free.rl, runner=runner), START, hardware).check()
    with pytest.raises(InputError, match="no setting of a batch makes it fit"):
        plan_rl(free.rl, START, Hardware.of("16", 1, 1)).check()


def test_devices_rows_and_processes_have_to_divide():
    options = settings("train_qwen3_4b_v5e16").rl
    with pytest.raises(InputError, match="does not divide 4 devices"):
        plan_rl(options, START, Hardware.of("v5e", 4, 1)).check()
    rows = replace(options, agentic=replace(options.agentic, micro_batch_size=8))
    with pytest.raises(InputError, match="8 rows are no multiple of the 16"):
        plan_rl(rows, START, Hardware.of("v5e", 16, 4)).check()
    with pytest.raises(InputError, match="16 do not divide over 3"):
        Hardware.of("v5e", 16, 3)
    assert ModelOptions(fsdp=16).shape(16) == (1, 16, 1)
    assert ModelOptions(tensor=2).shape(8) == (1, 4, 2)


def test_a_gpu_gives_a_share_of_its_memory(monkeypatch):
    monkeypatch.setenv(FRACTION, "0.4")
    assert Hardware.of("H200", 1, 1).memory == int(0.4 * 141e9)
    assert Hardware.of("v5e", 1, 1).memory == 16 * 2**30
    assert Hardware.of("24.5", 1, 1).memory == int(24.5 * 2**30)
    for wrong in ("H300", "-1", "0"):
        with pytest.raises(InputError, match="expected GiB or one of H200"):
            Hardware.of(wrong, 1, 1)


def test_a_dry_run_needs_no_weights(tmp_path, capsys):
    llm, out = tmp_path / "llm", tmp_path / "out"
    llm.mkdir()
    (llm / "config.json").write_text(json.dumps(QWEN3_4B.to_hf(dtype="bfloat16")))
    line = ("policy", "rl", "--config", "configs/train_qwen3_4b_v5e16.yaml", "--llm", llm,
            "--model", tmp_path / "world_model", "--out", out, "--dry-run", "--device-memory",
            "v5e", "--devices", 16, "--processes", 4)  # fmt: skip
    finish(*line)
    shown = capsys.readouterr().out
    assert "key-value cache" in shown and "there are 16.0 GiB (v5e)" in shown
    refuse(call(capsys, *line, "--set", "rl.runner.cache_tokens=0"), "rl.runner.concurrency: 64 ->")
    refuse(call(capsys, *line[:-4]), "divide")
    assert not out.exists()
