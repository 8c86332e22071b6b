"""Kernels, bytes and operations of programs: by hand, and of a sweep against its formula."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy.qwen3 import Qwen3Config
from policy.qwen3.sharding import make_mesh
from sepsis_jax.benchmark.ahead_of_time import CARDS, Bootstrap, Sampling, Sweep, bytes_planned
from sepsis_jax.benchmark.hardware import Shape, recurrent_flops
from sepsis_jax.benchmark.programs import traffic
from worldmodel.models.clinical_model import ModelConfig

ROOT = Path(__file__).resolve().parents[3]

# A loop of seven steps: a row is cut out of a table of seven, multiplied, and written to its place.
HLO = """HloModule made

%take (p0: f32[7,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[7,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,8}
}

%put (q0: f32[7,4], q1: f32[1,4], q2: s32[]) -> f32[7,4] {
  %q0 = f32[7,4]{1,0} parameter(0)
  %q1 = f32[1,4]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %new = f32[7,4]{1,0} dynamic-update-slice(%q0, %q1, %q2, %none)
}

%body (state: (s32[], f32[7,8], bf16[8,4], f32[7,4])) -> (s32[], f32[7,8], bf16[8,4], f32[7,4]) {
  %state = (s32[], f32[7,8]{1,0}, bf16[8,4]{1,0}, f32[7,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %table = f32[7,8]{1,0} get-tuple-element(%state), index=1
  %w = bf16[8,4]{1,0} get-tuple-element(%state), index=2
  %out = f32[7,4]{1,0} get-tuple-element(%state), index=3
  %row = f32[1,8]{1,0} fusion(%table, %i), kind=kLoop, calls=%take
  %product = f32[1,4]{1,0} dot(%row, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %written = f32[7,4]{1,0} fusion(%out, %product, %i), kind=kLoop, calls=%put
  ROOT %again = (s32[], f32[7,8], bf16[8,4], f32[7,4]) tuple(%i, %table, %w, %written)
}

ENTRY %main (a: f32[7,8], b: bf16[8,4]) -> f32[7,4] {
  %a = f32[7,8]{1,0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %start = (s32[], f32[7,8]{1,0}, bf16[8,4]{1,0}, f32[7,4]{1,0}) tuple(%a, %b)
  %on_chip = f32[128,128]{1,0:T(8,128)S(1)} copy(%a)
  %loop = (s32[], f32[7,8], /*index=2*/bf16[8,4], f32[7,4]) while(%start), body=%body, LOOP
  ROOT %result = f32[7,4]{1,0} get-tuple-element(%loop), index=3
}
""".replace("LOOP", 'condition=%c, backend_config={"known_trip_count":{"n":"7"}}')


def test_a_program_by_hand():
    found = traffic(HLO)
    row = (32 + 4) + 32  # a row of the table and its number, not the table; written
    product = 32 + 64 + 16  # row, weights in two bytes, result
    written = 16 + 4 + 16  # a row of the result, not the result
    copy = 7 * 8 * 4  # into a TPU's own memory: read alone
    assert found.bytes == 7 * (row + product + written) + copy
    assert found.kernels == 7 * 3 + 1
    assert found.flops == 7 * 2 * 8 * 4
    assert found.by_opcode == {
        "fusion": 7 * (row + written), "dot": 7 * product, "copy": copy,
    }  # fmt: skip


def test_what_is_scattered_is_written_in_place():
    put = "dynamic-update-slice(%q0, %q1, %q2, %none)"
    assert put in HLO
    scattered = HLO.replace(put, "scatter(%q0, %q2, %q1), update_window_dims={0,1}")
    assert traffic(scattered).bytes == traffic(HLO).bytes


def test_a_loop_that_says_its_bound_in_its_condition():
    text = HLO.replace(', backend_config={"known_trip_count":{"n":"7"}}', "").replace(
        "ENTRY",
        """%c (now: (s32[])) -> pred[] {
  %now = (s32[]) parameter(0)
  %at = s32[] get-tuple-element(%now), index=0
  %end = s32[]{:T(128)} constant(5)
  ROOT %more = pred[] compare(%at, %end), direction=LT
}

ENTRY""",
    )
    assert traffic(text).flops == 5 * 2 * 8 * 4


def test_products_of_cublas_and_of_tpus():
    text = HLO.replace(
        "dot(%row, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        'custom-call(%row, %w), custom_call_target="__cublas$gemm", backend_config={'
        '"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
    )
    assert "cublas" in text and traffic(text).flops == 7 * 2 * 8 * 4
    text = HLO.replace(
        "dot(%row, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "convolution(%row, %w), dim_labels=bf_io->bf",
    )
    assert "convolution" in text and traffic(text).flops == 7 * 2 * 8 * 4


@pytest.mark.parametrize("said", [
    '"custom_call_config":{"cost_estimate":{"flops":"96","transcendentals":"0"}}',
    r'num_warps = 8 : i32, serialized_metadata = "{\22flops\22: \2296\22}"',
], ids=["TPU", "GPU"])  # fmt: skip
def test_a_pallas_kernel_says_what_it_multiplies(said):
    text = HLO.replace(
        "dot(%row, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        f'custom-call(%row, %w), custom_call_target="pallas", backend_config={{{said}}}',
    )
    found, whole = traffic(text), traffic(HLO)
    assert found.flops == 7 * 96
    assert found.bytes == whole.bytes  # its operands and results, as of any kernel


def test_what_is_sliced_into_a_tpus_own_memory_is_read():
    on_chip = "f32[1,8]{1,0:S(1)}"
    text = HLO.replace("ROOT %cut = f32[1,8]{1,0}", f"ROOT %cut = {on_chip}")
    assert on_chip in text and traffic(text).bytes == traffic(HLO).bytes


def test_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        traffic("HloModule empty")


def test_loops_count_as_often_as_they_run():
    def steps(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    program = jax.jit(steps).lower(jnp.ones((8, 16)), jnp.ones((16, 16))).compile()
    found = traffic(program.as_text())
    assert found.flops == 7 * 2 * 8 * 16 * 16
    assert found.bytes >= 7 * 4 * (8 * 16 + 16 * 16 + 8 * 16)


def test_a_sweep_multiplies_as_counted_by_shapes():
    """A step of the recurrent world model, as XLA compiles it, has the products of its formula."""
    sweep = Sweep("recurrent", "highest", branches=2500, horizon=12)
    program = sweep.lower(jax.devices()[:1]).compile()
    shape = Shape(*sweep.shape)
    steps = np.prod(sweep.shape) * sweep.horizon
    by_shapes = recurrent_flops(ModelConfig(), shape, sweep.horizon, recorded=20)
    found = traffic(program.as_text()).flops / steps
    assert found == pytest.approx(by_shapes, rel=1e-3)


def test_a_drawn_token_reads_weights_and_cache():
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=1e4,
        tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    mesh = make_mesh(devices=jax.devices("cpu")[:1])
    lowered = Sampling(rows=3, prompt=48, new=16).lower(config, mesh)
    programs = {name: one.compile() for name, one in lowered.items()}
    cache = 2 * 2 * 3 * 64 * 2 * 16 * 2  # k and v, layers, rows, slots, heads, width, bytes
    weights = 2 * (512 * 64 + 2 * 64 * (64 + 32 + 32 + 64 + 3 * 128))
    planned = bytes_planned(programs["drawing"])
    assert planned["given_away"] >= cache
    assert planned["arguments"] == pytest.approx(weights + cache, rel=0.02)
    moved = traffic(programs["drawing"].as_text())  # the loop over tokens once
    assert moved.bytes > weights + cache


def test_resamples_multiply_counts_with_columns():
    case = Bootstrap(stays=100, steps=5, policies=2, resamples=16)
    program = case.lower(jax.devices("cpu")[0]).compile()
    planned = bytes_planned(program)
    assert planned["arguments"] >= 16 * 100  # counts, a byte each


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="no jax[cuda13]")
def test_compiles_for_a_card_that_is_not_there(tmp_path):
    """One rollout and a thin Qwen3-4B; both fit with a tenth to spare."""
    script = [sys.executable, ROOT / "scripts" / "compile_gpu.py", "--json", tmp_path / "gpu.json"]
    thin = ["--cards", "h100", "--variants", "recurrent", "--precisions", "bfloat16",
            "--layers", "2", "--length", "2048"]  # fmt: skip
    subprocess.run([*script, *thin], check=True, capture_output=True, cwd=ROOT)
    found = json.loads((tmp_path / "gpu.json").read_text())
    for row in (*found["rollouts"], *found["updates"], *found["others"]):
        assert row["bytes"]["peak"] < 0.9 * CARDS[row["card"]].memory
    assert {row["kernel"] for row in found["rollouts"]} == {"xla", "pallas"}
    assert all(row["branch_steps_by_bandwidth"] > 100e6 for row in found["rollouts"])
