"""How new weights reach a generator: the sampler of this process, or a vLLM server."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Protocol

from jax.typing import DTypeLike

from policy.qwen3.lora import merge_adapters, save_adapters
from policy.qwen3.model import Qwen3
from policy.qwen3.weights import save_hf
from policy.serving.embedded import EmbeddedGenerator
from policy.serving.vllm.control import WeightControl
from policy.serving.vllm.generator import VLLMGenerator
from policy.train.loop.learner import cast


class Publisher(Protocol):
    """Sends weights to a generator."""

    def release(self) -> None:
        """Lets go of the weights of before, if they are in this process."""
        ...

    async def publish(self, model: Qwen3, version: str) -> None:
        """Makes all later tokens of the generator come from these weights and carry the version.

        Raises:
          BackendError: the generator could not take them.
        """
        ...


class EmbeddedPublisher:
    """To the sampler of this process."""

    def __init__(self, generator: EmbeddedGenerator):
        self._generator = generator

    def release(self) -> None:
        """See `Publisher`."""
        self._generator.release_weights()

    async def publish(self, model: Qwen3, version: str) -> None:
        """See `Publisher`."""
        self._generator.set_weights(model, version)


class RemotePublisher:
    """To another process, whose memory is its own."""

    def release(self) -> None:
        """See `Publisher`: there is nothing here."""


class ServerPublisher(RemotePublisher):
    """To a vLLM server that shares a disk with the trainer: a folder per version, then a swap.

    Adapters are merged, so that the server holds plain weights; folders that are no longer
    served are removed.

    Args:
      control: of the server, which reads folders under the same path.
      folder: where versions are written.
      source: Hugging Face folder that everything but the weights is copied from.
      dtype: of the weights as written, such as "bfloat16".
    """

    def __init__(self, control: WeightControl, folder: Path, *, source: Path, dtype: DTypeLike):
        self._control, self._folder, self._source, self._dtype = control, folder, source, dtype
        self._served: Path | None = None

    async def publish(self, model: Qwen3, version: str) -> None:
        """See `Publisher`."""
        place = self._folder / version
        await asyncio.to_thread(self._write, model, place)
        await self._control.swap(place, version)
        if self._served is not None and self._served != place:
            shutil.rmtree(self._served, ignore_errors=True)
        self._served = place

    def _write(self, model: Qwen3, place: Path) -> None:
        plain = cast(merge_adapters(model), self._dtype)
        save_hf(plain, place, source=self._source)


class AdapterPublisher(RemotePublisher):
    """To a vLLM server that takes adapters (`lora_rank`): they alone travel, the base stays.

    Every version is an adapter of its own, named after it, so that no cache of another is met.

    Args:
      control: of the server, which reads folders under the same path.
      generator: that is to speak with the adapters.
      folder: where versions are written.
      base: Hugging Face folder of the weights beneath, which the server serves.
    """

    def __init__(
        self, control: WeightControl, generator: VLLMGenerator, folder: Path, *, base: Path
    ):
        self._control, self._generator = control, generator
        self._folder, self._base = folder, base
        self._served: str | None = None

    async def publish(self, model: Qwen3, version: str) -> None:
        """See `Publisher`."""
        place = self._folder / version
        await asyncio.to_thread(save_adapters, model, place, base=str(self._base))
        await self._control.load_adapter(version, place)
        self._generator.use_adapter(version)
        if self._served is not None and self._served != version:
            await self._control.unload_adapter(self._served)
            shutil.rmtree(self._folder / self._served, ignore_errors=True)
        self._served = version
