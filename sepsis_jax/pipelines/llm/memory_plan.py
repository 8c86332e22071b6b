"""What a stage needs of each device's memory, before it starts, and what to change if too much."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import jax

from policy.qwen3.config import Qwen3Config, load_config
from policy.train.loop import memory
from policy.train.loop.memory import Budget, Model
from sepsis_jax.pipelines.llm.rl import RLOptions
from sepsis_jax.pipelines.llm.setup import ModelOptions, SupervisedOptions
from sepsis_jax.pipelines.llm.supervised import BCOptions, SFTOptions
from worldmodel.errors import InputError
from worldmodel.files import read_json
from worldmodel.resources import bucket

OptionsT = TypeVar("OptionsT", SupervisedOptions, RLOptions)

GIB = 2**30
CARDS = {  # bytes, and whether JAX takes a share of them alone
    "H200": (141_000_000_000, True),
    "H100": (80_000_000_000, True),
    "A100": (80_000_000_000, True),
    "v5e": (16 * GIB, False),
    "v5p": (95 * GIB, False),
    "v6e": (32 * GIB, False),
}
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_FRACTION = 0.75  # JAX's own, of a GPU


@dataclass(frozen=True)
class Hardware:
    """The devices of a job.

    Attributes:
      devices: of all processes together.
      processes: that share them out.
      memory: bytes of a device that JAX may take; None if unknown, as on CPUs.
      name: for messages.
      on_cpu: whether they are CPUs.
    """

    devices: int
    processes: int
    memory: int | None
    name: str
    on_cpu: bool = False

    @classmethod
    def of(
        cls, memory: str | None = None, devices: int | None = None, processes: int | None = None
    ) -> Hardware:
        """The devices of this job, or others that are absent.

        Args:
          memory: GiB of a device, or one of `CARDS`, of which GPUs give JAX the share in
            $XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 without it; that of this job's if not given.
          devices, processes: this job's if not given.

        Raises:
          InputError: an unknown card, or devices that do not divide over the processes.
        """
        count = jax.device_count() if devices is None else devices
        hosts = jax.process_count() if processes is None else processes
        if count < 1 or hosts < 1 or count % hosts:
            raise InputError(f"devices: {count} do not divide over {hosts} processes")
        if memory is None:
            first = jax.local_devices()[0]
            stats = first.memory_stats() or {}
            limit = stats.get("bytes_limit")
            return cls(count, hosts, limit, first.device_kind, first.platform == "cpu")
        if memory in CARDS:
            size, shared = CARDS[memory]
            share = float(os.environ.get(FRACTION, _FRACTION)) if shared else 1.0
            name = f"{memory}, {share:.0%} of {size / GIB:.1f} GiB" if shared else memory
            return cls(count, hosts, int(share * size), name)
        try:
            size = int(float(memory) * GIB)
        except ValueError:
            size = 0
        if size <= 0:
            raise InputError(
                f"device memory: got {memory!r}, expected GiB or one of {', '.join(CARDS)}"
            )
        return cls(count, hosts, size, f"{memory} GiB")


@dataclass(frozen=True)
class Start:
    """What a run begins with: the figures of the model, and the type of its files."""

    config: Qwen3Config
    dtype: str = "bfloat16"

    @classmethod
    def load(cls, folder: Path) -> Start:
        """From a folder's config.json alone.

        Raises:
          InputError: as `load_config`.
        """
        config, values = load_config(folder), read_json(folder / "config.json")
        return cls(config, str(values.get("dtype") or values.get("torch_dtype") or "bfloat16"))

    def model(self, options: ModelOptions, hardware: Hardware) -> Model:
        """The model on its devices."""
        return Model(
            self.config,
            dtype=options.dtype or self.dtype,
            param_dtype=self.dtype,
            lora_rank=options.lora_rank,
            mesh=options.shape(hardware.devices),
        )


def supervised_budget(start: Start, options: SupervisedOptions, hardware: Hardware) -> Budget:
    """Of stage I or II.

    Raises:
      InputError: rows, devices or the model do not divide.
    """
    model = start.model(options.model, hardware)
    _check_rows(options.micro_batch_size, model)
    learning = memory.update(
        model, options.learner,
        rows=options.micro_batch_size, length=options.row_length, remat=options.model.remat,
    )  # fmt: skip
    return Budget(memory.kept(model, options.learner), {"learning": learning})


def rl_budget(
    start: Start, options: RLOptions, hardware: Hardware, *, embedded: bool = True
) -> Budget:
    """Of stage III.

    Args:
      start, options, hardware: of the run.
      embedded: whether the sampler is in the learners' processes; else a server samples.

    Raises:
      InputError: rows, patients, devices or the model do not divide.
    """
    model, config, runner = start.model(options.model, hardware), options.agentic, options.runner
    several = hardware.processes > 1
    _check_rows(config.micro_batch_size, model)
    dtype = options.model.save_dtype or start.dtype
    kept = memory.kept(model, options.learner)
    if config.objective.beta and not model.lora_rank:  # else the frozen weights are the reference
        kept["reference"] = model.weights(model.mesh)
    older = config.staleness * model.copies(model.mesh, dtype)
    learner = replace(options.learner, gradient_accumulation_steps=2)  # micro-batches as they come
    phases = {
        "learning": memory.update(
            model, learner,
            rows=config.micro_batch_size, length=config.row_length, remat=config.remat,
        )
    }  # fmt: skip
    if not embedded:
        kept["published weights"] = max(older, model.copies(model.mesh, dtype))
        return Budget(kept, phases)
    mesh = model.mesh
    if several:
        mesh = replace(options.model, fsdp=0).shape(hardware.devices // hardware.processes)
        kept["published weights"] = older
    if not several:
        kept["sampler's weights"] = max(older, model.copies(mesh, dtype))
    elif model.lora_rank:
        kept["sampler's weights"] = model.weights(mesh)
    else:
        kept["sampler's weights"] = model.copies(mesh, dtype)
    new = bucket(runner.dialogue.sampling.max_completion_length)
    phases["sampling"] = memory.sampling(
        model, mesh, rows=bucket(runner.concurrency),
        prompt=min(bucket(config.row_length), start.config.max_position_embeddings),
        new=new, cache_tokens=runner.cache_tokens, prefix_rows=runner.prefix_rows,
        on_cpu=hardware.on_cpu,
    )  # fmt: skip
    if hardware.on_cpu:
        kept["sampler's layers apart"] = model.layers(mesh)
    return Budget(kept, phases, together=config.staleness > 0)


def _check_rows(rows: int, model: Model) -> None:
    share = math.prod(model.mesh[:2])
    if rows % share:
        raise InputError(
            f"micro_batch_size: {rows} rows are no multiple of the {share} devices along data and "
            "fsdp"
        )


@dataclass(frozen=True)
class Plan(Generic[OptionsT]):
    """A stage on its devices.

    Attributes:
      name: of the stage, as a section of the settings.
      options: its settings.
      hardware: its devices.
      budget_of: of any settings.
    """

    name: str
    options: OptionsT
    hardware: Hardware
    budget_of: Callable[[OptionsT], Budget]

    @property
    def budget(self) -> Budget:
        """Of the settings."""
        return self.budget_of(self.options)

    def verdict(self) -> str:
        """One line: what is needed, and of how much."""
        memory = self.hardware.memory
        needs = f"{self.name}: {self.budget.peak / GIB:.1f} GiB of each device's memory"
        if memory is None:
            return f"{needs}; how much there is is not known ({self.hardware.name})"
        return f"{needs}; there are {memory / GIB:.1f} GiB ({self.hardware.name})"

    def check(self) -> None:
        """Makes sure that it fits, where the memory is known.

        Raises:
          InputError: it does not; names the settings to change.
        """
        if self._fits(self.options):
            return
        raise InputError(f"{self.verdict()}; {self._mended()}")

    def _fits(self, options: OptionsT) -> bool:
        memory = self.hardware.memory
        return memory is None or self.budget_of(options).peak <= memory

    def _mended(self) -> str:
        """The settings that make it fit, found one after another."""
        tried = self.options
        changes: dict[str, str] = {}
        for name, changed, told in self._changes():
            changes[name] = told
            tried = changed(tried)
            if self._fits(tried):
                return "set " + ", ".join(f"{self.name}.{key}: {x}" for key, x in changes.items())
        return "no setting of a batch makes it fit; share it out over more devices (model.fsdp)"

    def _changes(self) -> Iterator[tuple[str, Callable[[OptionsT], OptionsT], str]]:
        """Settings by dotted name, how they are changed, and what is told of it."""
        options = self.options
        share = math.prod(options.model.shape(self.hardware.devices)[:2])
        if isinstance(options, SupervisedOptions):
            yield from self._changed("micro_batch_size", share)
            yield from self._changed("model.remat", "full")
        else:
            bound = "cache_tokens" if options.runner.cache_tokens else "concurrency"
            unit = 1024 if options.runner.cache_tokens else 1
            yield from self._lowered(f"runner.{bound}", unit)
            yield from self._changed("agentic.remat", "full")
            yield from self._changed("agentic.micro_batch_size", share)
            yield from self._changed("agentic.staleness", 0)
            yield from self._lowered(f"runner.{bound}", unit)
        yield from self._changed("learner.param_dtype", "bfloat16")
        yield from self._changed("learner.moment_dtype", "bfloat16")

    def _changed(
        self, name: str, value: object
    ) -> Iterator[tuple[str, Callable[[OptionsT], OptionsT], str]]:
        before = _get(self.options, name)
        if before != value:
            yield name, partial(_set, name=name, value=value), f"{before} -> {value}"

    def _lowered(
        self, name: str, unit: int
    ) -> Iterator[tuple[str, Callable[[OptionsT], OptionsT], str]]:
        """The largest power of two times a unit at which all fits, if there is one."""
        before = _get(self.options, name)
        assert isinstance(before, int)
        value = 1 << max(before // unit - 1, 1).bit_length() - 1
        while value >= 1:
            lower = value * unit
            yield name, partial(_set, name=name, value=lower), f"{before} -> {lower}"
            value //= 2


def _get(options: object, name: str) -> object:
    for part in name.split("."):
        options = getattr(options, part)
    return options


def _set(options: OptionsT, name: str, value: object) -> OptionsT:
    first, _, rest = name.partition(".")
    inner = getattr(options, first)
    changed = {first: _set(inner, rest, value) if rest else value}
    return replace(options, **changed)  # type: ignore[arg-type]


def plan_sft(options: SFTOptions, start: Start, hardware: Hardware) -> Plan[SupervisedOptions]:
    """Stage I on its devices."""
    budget_of = partial(supervised_budget, start, hardware=hardware)
    return Plan("sft.training", options.training, hardware, budget_of)


def plan_bc(options: BCOptions, start: Start, hardware: Hardware) -> Plan[SupervisedOptions]:
    """Stage II on its devices."""
    budget_of = partial(supervised_budget, start, hardware=hardware)
    return Plan("bc.training", options.training, hardware, budget_of)


def plan_rl(
    options: RLOptions, start: Start, hardware: Hardware, *, embedded: bool = True
) -> Plan[RLOptions]:
    """Stage III on its devices; `embedded` as for `rl_budget`."""
    budget_of = partial(rl_budget, start, hardware=hardware, embedded=embedded)
    return Plan("rl", options, hardware, budget_of)
