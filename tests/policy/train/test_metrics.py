"""The log beside what went in, the file after a resume, FLOPs beside published figures."""

import json
import sys
from dataclasses import replace

import pytest
import wandb

from policy.qwen3.config import Qwen3Config
from policy.train.data.packing import Rows
from policy.train.loop.metrics import (
    MetricsLog,
    Report,
    Throughput,
    flops_per_token,
    log_courses,
    multiplied,
    peak_flops,
    tokens_read,
)
from worldmodel.errors import InputError

QWEN3_4B = Qwen3Config(
    vocab_size=151_936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=True,
    bos_token_id=151_643,
    eos_token_id=151_645,
)


def report_of(step, loss=1.5):
    return Report(step, loss, 8.0, 10.0, 4.0, 2.0, 0.5, 1e-3, {"entropy": 0.25})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_report_becomes_a_line(tmp_path, caplog):
    throughput = Throughput(flops=10.0, peak=500.0)
    with MetricsLog(tmp_path, throughput=throughput) as log:
        log.report(report_of(1))
        log.report(report_of(2, float("nan")))
    assert lines(tmp_path / "metrics.jsonl")[0] == {
        "step": 1,
        "loss": 1.5,
        "tokens": 8.0,
        "tokens_read": 10.0,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "entropy": 0.25,
    }
    assert lines(tmp_path / "metrics.jsonl")[1]["loss"] is None
    assert not caplog.records  # tensorboardX warns of what is no number
    assert lines(tmp_path / "timing.jsonl") == [
        {"step": 1, "tokens_per_s": 4.0, "seconds": 2.0},
        {"step": 2, "tokens_per_s": 4.0, "seconds": 2.0, "read_per_s": 5.0, "mfu": 0.1},
    ]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"entropy" in events.read_bytes() and b"mfu" in events.read_bytes()


def test_a_resumed_log_is_the_log_of_one_run(tmp_path):
    with MetricsLog(tmp_path / "whole") as log:
        for step in range(1, 6):
            log.report(report_of(step))
    with MetricsLog(tmp_path / "parts") as log:
        for step in range(1, 5):
            log.report(report_of(step, step / 3 if step > 2 else 1.5))
    file = tmp_path / "parts/metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 5, "lo')
    with MetricsLog(tmp_path / "parts", resume_at=2) as log:
        for step in range(3, 6):
            log.report(report_of(step))
    assert file.read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    MetricsLog(tmp_path / "parts").close()
    assert file.read_bytes() == b""


def sent(folder):
    """Files of W&B's runs; a process of its own writes them, also after `finish`."""
    wandb.teardown()
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_weights_and_biases_where_a_project_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "sepsis")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        with MetricsLog(tmp_path / "run" / "metrics", resume_at=step - 1) as log:
            log.report(report_of(step))
    found = sent(tmp_path / "run" / "metrics")
    assert len(found) == 2 and len({path.name for path in found}) == 1  # one run, resumed
    for path in found:
        assert all(name in path.read_bytes() for name in (b"entropy", b"grad_norm", b"seconds"))


def test_courses_go_to_weights_and_biases(tmp_path, monkeypatch):
    courses = {"state": [{"epoch": 1, "train_loss": 2.5}, {"epoch": 2, "train_loss": 2.25}]}
    log_courses(tmp_path / "model", courses)  # nowhere, since no project is named
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WANDB_PROJECT", "sepsis")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    log_courses(tmp_path / "model", courses)
    (found,) = sent(tmp_path / "elsewhere")
    assert b"state/train_loss" in found.read_bytes() and b"2.25" in found.read_bytes()
    assert not (tmp_path / "model").exists()


def test_weights_and_biases_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "sepsis")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        InputError, match=r"wandb is not installed; pip install sepsis-jax\[wandb\]"
    ):
        MetricsLog(tmp_path)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write metrics here"):
        MetricsLog(tmp_path / "file")


def test_tokens_read():
    segments = [[1, 1, 2, 0], [1, 0, 0, 0]]
    rows = Rows(segments, segments, segments, segments)
    assert tokens_read({"rows": jax_tree(rows), "advantage": jax_tree([[1.0, 2.0]])}) == 4
    assert tokens_read(jax_tree([1, 2])) == 0


def jax_tree(tree):
    import jax
    import numpy as np

    return jax.tree.map(np.asarray, tree, is_leaf=lambda x: isinstance(x, list))


def test_flops_of_qwen3_4b():
    # 4,022,468,096 parameters, of which norms: 36 layers x (2 x 2560 + 2 x 128) + 2560.
    assert multiplied(QWEN3_4B) == 4_022_468_096 - 36 * (2 * 2560 + 2 * 128) - 2560
    assert multiplied(replace(QWEN3_4B, tie_word_embeddings=False)) == multiplied(QWEN3_4B)
    attention = 12 * 36 * 32 * 128 * 8192
    assert flops_per_token(QWEN3_4B, 8192) == 6 * multiplied(QWEN3_4B) + attention
    assert flops_per_token(QWEN3_4B, 0, adapters=True) == 4 * multiplied(QWEN3_4B)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_throughput_is_a_moving_average_without_the_first():
    throughput = Throughput(1.0, None, decay=0.5)
    assert throughput.update(1, 1000.0) == {}
    assert throughput.update(100, 1.0) == {"read_per_s": 100.0}
    assert throughput.update(400, 1.0) == {"read_per_s": (50 + 400) / 1.5}
