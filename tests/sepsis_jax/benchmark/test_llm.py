"""`bench llm` from end to end, small, with the contenders that are installed."""

import json
from dataclasses import replace
from functools import partial

import pytest

from sepsis_jax.benchmark import llm, llm_worker
from tests.sepsis_jax.command_line import call, leftovers, refuse
from worldmodel.errors import InputError

SMALL = {
    "rows": 2, "prompt": 16, "new": 8, "dialogues": 2, "turns": 2, "said": 16, "update_rows": 1,
    "update_length": 64, "long_row": 0,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Little to draw and to learn, by a small model."""
    monkeypatch.setattr(llm, "LlmBenchOptions", partial(llm.LlmBenchOptions, **SMALL))
    tiny = replace(llm.MODEL, vocab_size=512, hidden_size=64, num_hidden_layers=2)
    monkeypatch.setattr(llm, "MODEL", tiny)


@pytest.mark.parity
def test_llm_beside_transformers_and_torch(small, tmp_path, capfd):
    out = tmp_path / "bench"
    names = ("embedded", "transformers", "learner", "torch")
    only = [word for name in names for word in ("--only", name)]
    result = call(capfd, "bench", "llm", *only, "--repeats", 1, "--out", out, "--json")
    assert result.status == 0, result.err
    assert leftovers(out) == [llm.RESULT]
    text = (out / llm.RESULT).read_text()
    assert str(tmp_path) not in text
    found = json.loads(text)
    rows = {(row["task"], row["contender"]): row for row in found["table"]}
    assert len(rows) == 6
    assert all(row["seconds"]["min"] > 0 and row["memory_bytes"] > 2**26 for row in rows.values())
    # Both learn the same tokens: the second update of each starts from the same first one.
    ours, other = (rows["update on 1 x 64", name]["loss"] for name in ("learner", "torch"))
    assert ours == pytest.approx(other, rel=1e-5)
    assert {(row["ours"], row["other"]) for row in found["ratios"]} == {
        ("embedded", "transformers"), ("learner", "torch"),
    }  # fmt: skip


def test_what_a_dialogue_reads():
    read = []

    def sample(prompts, new):
        read.append([len(prompt) for prompt in prompts])
        return [[0] * new for _ in prompts]

    task = {"rows": 3, "length": 5, "new": 2, "turns": 3, "vocab": 9, "seed": 0}
    llm_worker.dialogues(sample, task, 0)
    assert read == [[5] * 3, [12] * 3, [19] * 3]
    assert llm_worker.drawn(task, 0) != llm_worker.drawn(task, 1)


def test_a_contender_that_ends_early_says_why(tmp_path):
    task = llm.LlmBenchOptions(**SMALL).tasks()["update on 1 x 64"][1]
    with (
        llm._Worker("learner", tmp_path / "none", task, tmp_path / "errors.txt") as worker,
        pytest.raises(InputError, match=r"learner: ended without a result: .*no such"),
    ):
        worker.run(0)


def test_what_llm_refuses(tmp_path, capfd, monkeypatch):
    out = ("--out", tmp_path / "out")
    refuse(call(capfd, "bench", "llm", "--quick", *out), "llm takes")
    refuse(call(capfd, "bench", "llm", "--horizon", 7, *out), "llm takes")
    refuse(call(capfd, "bench", "llm", "--only", "ollama", *out), "only")
    monkeypatch.setenv("SEPSIS_JAX_SERVING", str(tmp_path))
    refuse(call(capfd, "bench", "llm", "--only", "vLLM", *out), "vLLM is not installed")
    assert not (tmp_path / "out").exists()
