"""Traces of a program whose parts are known."""

import jax
import jax.numpy as jnp
import pytest

from sepsis_jax.benchmark.profiling import (
    CONTAINER,
    PARTS,
    Span,
    busy_seconds,
    parts_of,
    read_spans,
)


def program(x, weight):
    def step(h, _):
        with jax.named_scope("recurrence"):
            product = h @ weight
            with jax.named_scope("gates"):
                h = jnp.tanh(product) * 0.5 + h
        with jax.named_scope("scoring"):
            score = jnp.sort(h, axis=-1)[:, 0]
        return h, score

    return jax.lax.scan(step, x, length=5)


def test_a_trace_names_the_parts(tmp_path):
    x = jnp.ones((256, 128))
    compiled = jax.jit(program).lower(x, jnp.eye(128)).compile()
    jax.block_until_ready(compiled(x, jnp.eye(128)))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(compiled(x, jnp.eye(128)))
    parts = parts_of(compiled.as_text())
    assert {"recurrence", "gates", "scoring", CONTAINER} <= set(parts.values())
    assert "gates" not in {part for name, part in parts.items() if name.startswith("dot")}
    busy = busy_seconds(read_spans(tmp_path), parts)
    assert set(busy) == set(PARTS)
    assert min(busy["recurrence"], busy["gates"], busy["scoring"]) > 0
    assert busy["heads"] == 0


def test_time_is_shared_by_what_is_in_flight():
    parts = {"a": "projection", "b": "heads", "loop": CONTAINER}
    spans = [
        Span("0", 0.0, 10e9, "loop"),
        Span("0", 0.0, 4e9, "a"),
        Span("0", 2e9, 4e9, "b"),
        Span("1", 0.0, 1e9, "b"),
        Span("1", 5e9, 6e9, "unheard of"),
    ]
    busy = busy_seconds(spans, parts)
    expected = {"projection": 3.0, "heads": 2.0, "other": 1.0}
    assert busy == pytest.approx({part: expected.get(part, 0.0) for part in PARTS})
