"""What `sepsis-jax doctor` looks at: devices, speed, and whether numbers are those of a CPU."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from policy.qwen3.attention import attend
from policy.qwen3.config import Qwen3Config
from policy.qwen3.logprobs import token_logprobs
from policy.qwen3.model import Qwen3
from policy.serving.vllm import find_environment
from policy.train.loop.metrics import peak_flops
from sepsis_jax.benchmark.ahead_of_time import CARDS, CHIPS
from sepsis_jax.benchmark.hardware import Shape, hardware, jax_products
from sepsis_jax.benchmark.setup import patient_pool, workload
from sepsis_jax.benchmark.timing import Contender, best, take_turns
from sepsis_jax.compiled_programs import FOLDER, unsafe_place
from sepsis_jax.runs import Progress, silent
from worldmodel import schema
from worldmodel.errors import InputError
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.resources import BFLOAT16
from worldmodel.scaling import published_scaler
from worldmodel.simulate.rollout import rollout

GOOD, WEAK, BAD = "good", "weak", "bad"
_REPEATS = 3
_SHARE_OF_PEAK = 0.4  # below it something is wrong: another program, power, or a wrong wheel
_COPY_BYTES = {"cpu": 2**28}
_TOLERANCE = 1e-3  # of float32 with full precision, between two kinds of device


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
      what: was looked at.
      verdict: GOOD, WEAK (it works, slower or with less than could be) or BAD.
      found: in words.
      mend: what to do; empty where it is good.
    """

    what: str
    verdict: str
    found: str
    mend: str = ""


def examine(progress: Progress = silent) -> list[Finding]:
    """Looks at everything; a check that fails is a finding, not an error.

    Args:
      progress: called with (phase, share done).
    """
    checks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("software", _software),
        ("devices", _devices),
        ("matrix products", _products),
        ("memory bandwidth", _bandwidth),
        ("rollout", _rollout),
        ("train step", _train_step),
        ("attention", _attention),
        ("vLLM", _vllm),
        ("compiled programs", _compiled_programs),
    )
    found = []
    for number, (what, check) in enumerate(checks):
        progress(what, number / len(checks))
        try:
            found.append(check())
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            found.append(
                Finding(what, BAD, f"{type(error).__name__}: {text[0]}", "report the whole error")
            )
    return found


def _software() -> Finding:
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    found = ", ".join(f"{name} {number}" for name, number in versions.items())
    if versions["jax"] != versions["jaxlib"]:
        mend = f'pip install "jaxlib=={versions["jax"]}"'
        return Finding("software", BAD, found + ": jax and jaxlib differ", mend)
    return Finding("software", GOOD, found)


def _devices() -> Finding:
    figures, backend = hardware(), jax.default_backend()
    memory = figures["device_memory_bytes"] or figures["memory_bytes"]
    found = f"{figures['devices']} x {figures['device']}, {memory / 2**30:.0f} GiB"
    if backend != "cpu":
        return Finding("devices", GOOD, found)
    found += f", {figures['cores']} cores: {figures['processor']}"
    for extra, there in (
        ("cuda13", shutil.which("nvidia-smi") is not None),
        ("tpu", any(Path("/dev").glob("accel*"))),
    ):
        if there:
            mend = f'pip install "jax[{extra}]", and leave JAX_PLATFORMS unset'
            return Finding("devices", BAD, found + "; JAX does not see the accelerator", mend)
    return Finding("devices", GOOD, found)


def _products() -> Finding:
    kind = jax.devices()[0].device_kind
    found, verdict, mend = [], GOOD, ""
    for precision in ("highest", BFLOAT16):
        fastest = best(take_turns(jax_products(precision), _REPEATS))
        rate = float(np.median(fastest.rates))
        name = "float32" if precision == "highest" else precision
        found.append(f"{rate / 1e12:,.2f} TFLOP/s in {name}")
        peak = peak_flops(kind)
        if precision == BFLOAT16 and peak is not None:
            share = rate / (peak * jax.local_device_count())
            found[-1] += f" ({share:.0%} of the peak)"
            if share < _SHARE_OF_PEAK:
                verdict = WEAK
                mend = "see whether other programs run and what the power limit is"
    return Finding("matrix products", verdict, ", ".join(found), mend)


def _bandwidth() -> Finding:
    count = _COPY_BYTES.get(jax.default_backend(), 2**31) // 4
    x = jnp.zeros(count, jnp.float32)
    call = jax.jit(lambda x: x + 1.0)
    contender = Contender("copy", lambda _: jax.block_until_ready(call(x)), 8.0 * count)
    (timed,) = take_turns([contender], _REPEATS)
    rate = float(np.median(timed.rates))
    found = f"{rate / 1e9:,.0f} GB/s"
    kind = jax.devices()[0].device_kind
    cards = {card.name: card.bandwidth for card in CARDS.values()}
    known = cards | {name: chip.bandwidth for name, chip in CHIPS.items()}
    if kind not in known:
        return Finding("memory bandwidth", GOOD, found)
    share = rate / known[kind]
    found += f" ({share:.0%} of the data sheet)"
    if share < _SHARE_OF_PEAK:
        mend = "see whether other programs use the memory"
        return Finding("memory bandwidth", WEAK, found, mend)
    return Finding("memory bandwidth", GOOD, found)


def _rollout() -> Finding:
    """Eight steps of a recurrent world model, with the same noise as on a CPU."""

    def simulated() -> np.ndarray:
        config = ModelConfig(precision="highest")
        world_model = init_world_model(jax.random.key(1), published_scaler(), config)
        job = workload(world_model, patient_pool(world_model, 0), Shape(4, 3, 2), 8, seed=0)
        found = rollout(
            job.world_model, jax.random.key(0), job.start, job.plans, samples=2,
            features=schema.FEATURE_NAMES,
        )  # fmt: skip
        scaled: np.ndarray = np.asarray(found.values) / np.asarray(published_scaler().std)
        return scaled

    return _compared("rollout", simulated, "simulated values, in standard deviations")


def _train_step() -> Finding:
    """Loss and gradient of a small Qwen3 on packed rows."""
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=1e6,
        tie_word_embeddings=True,
    )  # fmt: skip

    def trained() -> np.ndarray:
        graphdef, state = nnx.split(Qwen3(config, rngs=nnx.Rngs(0)))
        ids = jax.random.randint(jax.random.key(1), (2, 300), 0, config.vocab_size)
        segments = jnp.repeat(jnp.array([[1, 2, 0]] * 2), jnp.array([140, 150, 10]), axis=1)

        def loss(state: object) -> jax.Array:
            model: Qwen3 = nnx.merge(graphdef, state)
            return -jnp.mean(token_logprobs(model, ids, segments=segments).logprob)

        value, gradient = jax.jit(jax.value_and_grad(loss))(state)
        norms = [jnp.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(gradient)]
        return np.asarray([value, *norms])

    return _compared("train step", trained, "loss and norms of gradients")


def _attention() -> Finding:
    """Attention by blocks beside JAX's own."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, 1500, heads, 64))
        for key, heads in zip(keys, (4, 2, 2), strict=True)
    )  # fmt: skip
    segments = jnp.repeat(jnp.array([[1, 2]]), jnp.array([900, 600]), axis=1)
    mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(1500, dtype=bool)
    with jax.default_matmul_precision("highest"):
        own = jax.jit(attend)(q, k, v, segments)
        other = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    apart = float(jnp.max(jnp.abs(own - other)))
    found = f"differs from JAX's own by {apart:.1e} at most"
    if apart < _TOLERANCE:
        return Finding("attention", GOOD, found)
    return Finding("attention", BAD, found, "update the driver and JAX, or report this")


def _compared(what: str, run: Callable[[], np.ndarray], values: str) -> Finding:
    """Numbers of the first device beside those of the CPU."""
    with jax.default_matmul_precision("highest"):
        own = run()
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            other = run()
    if not np.isfinite(own).all():
        return Finding(what, BAD, f"{values}: not finite", "update the driver and JAX")
    apart = float(np.max(np.abs(own - other) / np.maximum(np.abs(other), 1.0)))
    found = f"{values}: {apart:.1e} from the CPU's at most"
    if jax.default_backend() == "cpu":
        found = f"{values}: finite, and the same when repeated"
    if apart < _TOLERANCE:
        return Finding(what, GOOD, found)
    return Finding(what, BAD, found, "update the driver and JAX, or report this")


def _compiled_programs() -> Finding:
    what = "compiled programs"
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    folder, enabled = (getattr(jax.config, name) for name in names)  # unknown to type checkers
    if not enabled:
        return Finding(what, GOOD, "not kept, as JAX_ENABLE_COMPILATION_CACHE says")
    if folder:
        return Finding(what, GOOD, f"kept in {folder}")
    unsafe = unsafe_place()
    if unsafe is None:
        return Finding(what, WEAK, "not kept: every command compiles anew", f"set {FOLDER}")
    found = f"not kept: {unsafe} is not a folder that you alone can write"
    return Finding(what, WEAK, found, f"see what is in it, then chmod 700 {unsafe}")


def _vllm() -> Finding:
    mend = "`make serving` installs it beside this environment; the embedded sampler needs none"
    if importlib.util.find_spec("vllm") is not None:
        try:
            return Finding("vLLM", GOOD, f"{version('vllm')}, in this environment")
        except PackageNotFoundError:
            return Finding("vLLM", WEAK, "in this environment, without a version", mend)
    try:
        serving = find_environment()
    except InputError as error:
        return Finding("vLLM", WEAK, f"neither in this environment nor beside it: {error}", mend)
    return Finding("vLLM", GOOD, f"{serving.version}, in {serving.python.parents[1].name}")
