"""What a measurement was made on, the peak rate of its matrix products, and a rollout's operations.

Floating-point operations of a rollout are counted by hand from the shapes: matrix products alone,
two operations per multiplication and addition; gates, noise and scores come on top and are what a
bound from products leaves out.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sepsis_jax.benchmark.timing import Contender
from sepsis_jax.runs import JsonDict
from worldmodel import schema
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.recurrent import CODE_WIDTH, DRAWN_WIDTH, ROW_WIDTH
from worldmodel.resources import BFLOAT16, compiler_options, usable_cores
from worldmodel.simulate.sharded import AXIS, branch_mesh


def hardware() -> JsonDict:
    """Devices, processor, cores, memory, and XLA's flags but for those that name files."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "/" not in flag]
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.local_device_count(),
        "device_memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "driver": getattr(device.client, "platform_version", None),
        "xla_flags": " ".join(flags),
    }


def torch_version() -> str | None:
    """The installed torch, without loading it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Name of the processor, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# Rows, depth, columns: a large square, and the recurrent product of a GRU of 128.
SHAPES = {"cpu": ((1536, 1536, 1536), (8192, 128, 384), (512, 128, 384))}
_ELSEWHERE = ((8192, 8192, 8192), (131_072, 128, 384), (1_048_576, 128, 384))
_LEAST = {"cpu": 4e9}  # operations in a timed run, so that the clock does not matter
_LEAST_ELSEWHERE = 4e12


def _shapes(platform: str) -> tuple[tuple[int, int, int], ...]:
    return SHAPES.get(platform, _ELSEWHERE)


def _calls(platform: str, flops: float) -> int:
    return max(1, round(_LEAST.get(platform, _LEAST_ELSEWHERE) / flops))


def jax_products(precision: str, *, everywhere: bool = True) -> list[Contender]:
    """Products in JAX, on one device and on all of them at once.

    Args:
      precision: as the models', or "bfloat16".
      everywhere: also on all devices at once.
    """
    counts = {1, jax.local_device_count()} if everywhere else {1}
    return [
        contender
        for shape in _shapes(jax.default_backend())
        for devices in sorted(counts)
        if (contender := _jax_product(shape, devices, precision))
    ]


def _jax_product(shape: tuple[int, int, int], devices: int, precision: str) -> Contender:
    rows, depth, columns = shape
    dtype = jnp.bfloat16 if precision == BFLOAT16 else jnp.float32

    def products(x: jax.Array, weight: jax.Array) -> jax.Array:
        def again(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, _out = carry
            if precision == BFLOAT16:
                out = jnp.matmul(x, weight, preferred_element_type=jnp.float32)
            else:
                out = jnp.matmul(x, weight, precision=precision)
            # Each product waits for the one before, so that none is left out.
            return x.at[0, 0].set(out[0, 0].astype(x.dtype)), out

        empty = jnp.zeros((x.shape[0], weight.shape[1]))
        product: jax.Array = jax.lax.fori_loop(0, calls, again, (x, empty))[1]
        return product

    flops = 2.0 * devices * rows * depth * columns
    calls = _calls(jax.default_backend(), flops)
    mesh = branch_mesh(jax.local_devices()[:devices])
    call = jax.jit(
        jax.shard_map(
            products,
            mesh=mesh,
            in_specs=(PartitionSpec(AXIS), PartitionSpec()),
            out_specs=PartitionSpec(AXIS),
            check_vma=False,
        ),
        compiler_options=compiler_options(precision),
    )
    key = jax.random.key(0)
    x = jax.random.normal(key, (devices * rows, depth)).astype(dtype)
    weight = jax.random.normal(key, (depth, columns)).astype(dtype)
    x = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec(AXIS)))
    weight = jax.device_put(weight, jax.NamedSharding(mesh, PartitionSpec()))

    def run(repeat: int) -> None:
        jax.block_until_ready(call(x, weight))

    text = " x ".join(map(str, shape))
    places = f"{devices} device{'s' * (devices > 1)}"
    return Contender(f"JAX {precision}, {text}, {places}", run, calls * flops)


def torch_products(torch: ModuleType, device: str) -> list[Contender]:
    """Products in torch, in float32 at the precision that was set."""
    contenders = []
    for rows, depth, columns in _shapes("gpu" if device == "cuda" else "cpu"):
        x = torch.randn(rows, depth, device=device)
        weight = torch.randn(depth, columns, device=device)
        out = torch.empty(rows, columns, device=device)
        flops = 2.0 * rows * depth * columns
        calls = _calls("gpu" if device == "cuda" else "cpu", flops)

        def run(
            repeat: int,
            x: Any = x,  # tensors of torch, for readers without torch
            weight: Any = weight,
            out: Any = out,
            calls: int = calls,
        ) -> None:
            for _ in range(calls):
                torch.mm(x, weight, out=out)
            if device == "cuda":
                torch.cuda.synchronize()

        contenders.append(
            Contender(f"torch float32, {rows} x {depth} x {columns}", run, calls * flops)
        )
    return contenders


_ROW = schema.NUM_FEATURES + schema.NUM_MASKED + schema.ACTION_WIDTH


class Shape(NamedTuple):
    """Branches of a workload: P patients under K plans with S samples each."""

    patients: int
    plans: int
    samples: int

    @property
    def branches(self) -> int:
        """P K S."""
        return self.patients * self.plans * self.samples


def plain_flops(config: ModelConfig, horizon: int) -> float:
    """Per branch-step, with whole windows run in each step, as `torch.nn.GRU` runs them.

    Args:
      config: shape of the model.
      horizon: steps H, over which the Outcome Model's one look is spread.
    """
    state = _window(config, schema.STATE_WINDOW)
    state += config.hidden * config.head + config.head  # ventilation
    state += (config.hidden + 1) * config.hidden  # transition
    state += config.hidden * 2 * schema.NUM_FEATURES
    if config.variant == "residual":
        state += (config.linear_rows * _ROW + schema.NUM_STATIC) * schema.NUM_FEATURES
    outcome = _window(config, schema.OUTCOME_WINDOW)
    outcome += config.hidden * config.head + config.head
    return 2.0 * (state + outcome / horizon)


def _window(config: ModelConfig, rows: int) -> int:
    """Multiplications of embedding and running a window."""
    gates = 3 * config.hidden
    first = (config.row_width + config.hidden) * gates
    above = (config.layers - 1) * 2 * config.hidden * gates
    embedded = rows * schema.ACTION_WIDTH * config.embed + schema.NUM_STATIC * config.embed
    return embedded + rows * (first + above)


def recurrent_flops(config: ModelConfig, shape: Shape, horizon: int, *, recorded: int = 0) -> float:
    """Per branch-step, of what `worldmodel.simulate.stay_unroll` does for the recurrent variant.

    One row is read per step. What branches share is done once: by patient before the first
    treatment, by plan after it, by branch once noise has been added; noise is common to the plans.

    Args:
      config: shape of the model.
      shape: branches.
      horizon: steps H.
      recorded: rows before the newest that are read first, by patient.
    """
    width, small, features = config.hidden, config.head, schema.NUM_FEATURES
    patient = shape.patients
    plan, branch = patient * shape.plans, shape.branches
    gates, linear = 3 * width, small + 2 * features + 3
    known, codes = int(ROW_WIDTH) - int(DRAWN_WIDTH), int(CODE_WIDTH)
    square = width * gates
    heads = width * (3 * features + 1) + small * 3

    def read(drawn: int, fixed: int) -> int:
        row = (drawn * DRAWN_WIDTH + fixed * known) * (gates + linear)
        return row + drawn * (square + width * (width + 2 * small) + small * schema.NUM_ACTIONS)

    def treated(residual: int) -> int:
        code = codes * (width + small + features + 3)
        return residual * (schema.NUM_ACTIONS * codes + code)

    noise = patient * shape.samples * features**2
    row_width = DRAWN_WIDTH + known
    total = recorded * patient * (row_width * gates + square)
    total += read(patient, patient) + plan * heads + noise
    total += (horizon - 1) * (read(branch, plan) + branch * heads + noise)
    # The clinician's propensity meets a treatment from the second step on by branch.
    total += treated(plan) + (horizon - 1) * treated(branch)
    # What was drawn, and after several steps the hidden state, differ between branches.
    end = (branch * DRAWN_WIDTH + plan * known) * (gates + 2)
    end += (patient if horizon == 1 else branch) * square + branch * (width * small + small * 2)
    return 2.0 * (total + end) / (branch * horizon)


def minimal_flops(config: ModelConfig, shape: Shape, horizon: int) -> float:
    """Per branch-step, of what `worldmodel.simulate.fused_gru` cannot do without.

    Every row moves each window that it belongs to by one step; the first step of a window needs
    no recurrent product, windows that would end after the horizon are not begun, and what
    branches share is done once: by patient before the first treatment, by plan after it, by
    branch once noise has been added. Under plans, with noise common to them.

    Args:
      config: shape of the model.
      shape: branches.
      horizon: steps H.
    """
    count = _Count(config, shape)
    patient, plan, branch = count.levels
    in_flight: list[int] = []  # of each window in flight, how many different hidden states it has
    window = schema.STATE_WINDOW
    for _ in range(window - 1):
        count.project(patient, patient, patient, lags=count.lags)
        for index, level in enumerate(in_flight):
            in_flight[index] = count.advance(level, patient)
        in_flight.append(count.start(patient))
    in_flight = in_flight[:horizon]
    obs = patient
    trail: list[tuple[int, int]] = []  # of every row, how many observations and actions
    for h in range(horizon):
        trail.append((obs, plan))
        count.project(obs, plan, patient, lags=count.lags)
        projected = max(obs, plan)
        in_flight = [count.advance(level, projected) for level in in_flight]
        if h + window <= horizon:
            in_flight.append(count.start(projected))
        count.heads(in_flight.pop(0))
        obs = branch
    rows = [(patient, patient)] * (schema.OUTCOME_WINDOW - 1) + [*trail, (obs, plan)]
    chain: int | None = None
    for seen, treated in rows[-schema.OUTCOME_WINDOW :]:
        count.project(seen, treated, patient, lags=0)
        projected = max(seen, treated)
        chain = count.start(projected) if chain is None else count.advance(chain, projected)
    assert chain is not None
    count.add(chain, config.hidden * config.head)
    return 2.0 * count.total / (shape.branches * horizon)


@dataclass
class _Count:
    """Multiplications so far."""

    config: ModelConfig
    shape: Shape
    total: int = 0

    @property
    def levels(self) -> tuple[int, int, int]:
        """Different rows by patient, by plan and by branch."""
        patients, plans, _ = self.shape
        return patients, patients * plans, self.shape.branches

    @property
    def lags(self) -> int:
        """Columns of the autoregression in a row's projection, in multiples of 39."""
        return self.config.linear_rows if self.config.variant == "residual" else 0

    def add(self, rows: int, products: int) -> None:
        self.total += rows * products

    def project(self, obs: int, action: int, fixed: int, *, lags: int) -> None:
        """A row into all that reads it; masks and static features are the patient's."""
        width = 3 * self.config.hidden + lags * schema.NUM_FEATURES
        self.add(obs, schema.NUM_FEATURES * width)
        self.add(action, schema.ACTION_WIDTH * width)
        self.add(fixed, (schema.NUM_MASKED + schema.NUM_STATIC) * width)

    def start(self, projected: int) -> int:
        """A window's first step; returns how many hidden states it has then."""
        self.add(projected, (self.config.layers - 1) * self._square)
        return projected

    def advance(self, hidden: int, projected: int) -> int:
        """A window's next step: layer 1 reads `projected` rows, the others what is below them."""
        moved = max(hidden, projected)
        self.add(hidden, self.config.layers * self._square)
        self.add(moved, (self.config.layers - 1) * self._square)
        return moved

    def heads(self, hidden: int) -> None:
        """Ventilation, transition, mu and log sigma."""
        width = self.config.head + self.config.hidden + 2 * schema.NUM_FEATURES
        self.add(hidden, self.config.hidden * width)

    @property
    def _square(self) -> int:
        return self.config.hidden * 3 * self.config.hidden
