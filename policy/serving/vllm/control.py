"""New weights and adapters for a running vLLM server, checked before the server is touched."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from policy.serving.backend import BackendError
from policy.serving.client import Client, Endpoint, MalformedError, member

_LOG = logging.getLogger(__name__)
_EMPTY = hashlib.sha256(b"").hexdigest()
_RESETS, _RESET_WAIT_S = 20, 0.25


@dataclass(frozen=True)
class Swap:
    """Result of a swap of weights."""

    version: str
    seconds: float  # without generation, draining included
    changed: bool  # whether the checksums differ from before
    unseen: int  # tensors without a checksum


class WeightControl:
    """Swaps weights of a server that was started with `swaps`; one controller per server."""

    def __init__(self, endpoint: Endpoint, folder: Path, *, key: str | None = None) -> None:
        """Opens no connection yet.

        Args:
          endpoint: the server. Requests are retried only while it is unreachable.
          folder: of the weights that it serves now; loaded again when a swap fails.
          key: instead of the endpoint's variable or file.

        Raises:
          InputError: the URL or the key is missing.
        """
        patience = min(endpoint.patience_s, 10.0)
        self._client = Client(replace(endpoint, attempts=1, patience_s=patience), key=key)
        self._given = folder
        self._folders: dict[str, Path] = {}  # by version
        self._known: dict[str, Mapping[str, str]] = {}  # checksums by fingerprint of the files
        self._lock = asyncio.Lock()

    async def swap(self, folder: Path, version: str) -> Swap:
        """Loads other weights of the same architecture while no request is running.

        Running requests finish with the old weights, and new requests wait for the new weights;
        nothing is aborted. The prefix cache is emptied. Before tokens are drawn again the
        server's checksums are compared with those of an earlier load of the same files.

        Args:
          folder: Hugging Face folder, as the server's machine names it.
          version: tag of later completions.

        Raises:
          BackendError: the folder is unfit and nothing was touched; or the swap failed and the
            old weights serve again; or that failed too, and the server stays paused, since its
            weights are neither: restart it.
        """
        await asyncio.to_thread(check_weights, folder, self._given)
        async with self._lock:
            version_before, before = await self.weight_version(), await self.checksums()
            self._folders = self._folders or {version_before: self._given}
            if version_before not in self._folders:
                raise BackendError(
                    f"the server is at version {version_before!r}, which this controller did not "
                    "load; make a new one with the folder that the server serves"
                )
            folder_before = self._folders[version_before]
            begun = time.monotonic()
            try:
                await self._client.post("/pause", None, _ignore, query={"mode": "wait"})
                after = await self._load(folder)
                await self._set_version(version)
            except BaseException as error:
                await asyncio.shield(self._go_back(folder_before, version_before, error))
                raise
            await self._client.post("/resume", None, _ignore)
            self._folders[version] = folder
            unseen = sum(value == _EMPTY for value in after.values())
            return Swap(version, time.monotonic() - begun, before != after, unseen)

    async def weight_version(self) -> str:
        """The version that the server tags its tokens with; "default" after a start."""
        return await self._client.get("/weight_info", lambda v: member(v, "weight_version", str))

    async def checksums(self) -> dict[str, str]:
        """SHA-256 by name of the server's tensors and of what its packed ones make of an input.

        Tensors that the server cannot read have the checksum of no bytes.
        """
        sums = await self._client.post("/weight_checker", {"action": "checksum"}, _checksums)
        call = {"method": "sepsis_jax_packed_checksums"}
        packed = await self._client.post("/collective_rpc", call, _of_workers)
        emptied = {f"{name}.weight" for worker in packed for name in worker}
        seen = {
            name: value
            for name, value in sums.items()
            if value != _EMPTY or name.rsplit(":", 1)[-1] not in emptied
        }
        return seen | {
            f"worker {i}, packed {name}": value
            for i, worker in enumerate(packed)
            for name, value in worker.items()
        }

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Loads a LoRA adapter, in the place of one of the same name.

        Requests then give its name for the model's. A new name for each version keeps what is
        running on the version that it began with.

        Raises:
          BackendError: the folder is unfit, or the server refuses it.
        """
        await asyncio.to_thread(check_adapter, folder)
        body = {"lora_name": name, "lora_path": str(folder.resolve()), "load_inplace": True}
        await self._client.tell("/v1/load_lora_adapter", body)

    async def unload_adapter(self, name: str) -> None:
        """Unloads a LoRA adapter.

        Raises:
          BackendError: there is none of that name.
        """
        await self._client.tell("/v1/unload_lora_adapter", {"lora_name": name})

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _load(self, folder: Path) -> dict[str, str]:
        """Reads weights into the paused server and empties its cache; returns the checksums."""
        print_ = await asyncio.to_thread(fingerprint, folder)
        call = {"method": "sepsis_jax_swap", "kwargs": {"folder": str(folder.resolve())}}
        await self._client.post("/collective_rpc", call, _ignore)
        # The cache holds keys and values of the old weights, and vLLM would go on using them.
        for _ in range(_RESETS):
            if await self._client.post(
                "/reset_prefix_cache", None, lambda v: member(v, "success", bool)
            ):
                break
            await asyncio.sleep(_RESET_WAIT_S)
        else:
            raise BackendError("the server did not empty its prefix cache")
        sums = await self.checksums()
        if self._known.setdefault(print_, sums) != sums:
            raise BackendError(f"{folder}: loaded again, these weights have other checksums")
        return sums

    async def _set_version(self, version: str) -> None:
        await self._client.post("/update_weight_version", {"new_version": version}, _ignore)

    async def _go_back(self, folder: Path, version: str, error: BaseException) -> None:
        """After a failed swap, which leaves tensors without values: the old weights, or none."""
        _LOG.warning("swap of weights failed (%s); going back to %s", error, folder)
        try:
            await self._load(folder)
            await self._set_version(version)
            await self._client.post("/resume", None, _ignore)
        except BackendError as worse:
            text = f"going back failed too ({worse}); the server may be paused: restart it"
            if isinstance(error, BackendError):
                raise BackendError(f"{error}; {text}") from None
            _LOG.error(text)


def _ignore(value: object) -> None:
    """Accepts any JSON."""


def _checksums(value: object) -> dict[str, str]:
    return _texts(member(value, "checksums", dict))


def _of_workers(value: object) -> list[dict[str, str]]:
    return [_texts(worker) for worker in member(value, "results", list)]


def _texts(sums: object) -> dict[str, str]:
    if not isinstance(sums, dict) or not all(isinstance(v, str) for v in sums.values()):
        raise MalformedError("checksums are no text")
    return sums


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a folder by name, from the headers of its safetensors files.

    Raises:
      BackendError: there are none, or a file is cut off or is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118, not a mapping
                    found[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise BackendError(f"{path}: not a whole safetensors file ({error})") from None
    if not found:
        raise BackendError(f"{folder}: no weights (*.safetensors)")
    return found


def check_weights(folder: Path, like: Path) -> None:
    """Makes sure that weights can take the place of others.

    Raises:
      BackendError: a file is missing or cut off, or tensors have other names or shapes.
    """
    new, old = shapes(folder), shapes(like)
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name):
            raise BackendError(
                f"{folder}: {name} is {_shape(new.get(name))}, in {like} it is "
                f"{_shape(old.get(name))}; weights to swap need equal names and shapes"
            )


def check_adapter(folder: Path) -> None:
    """Makes sure that a folder holds a LoRA adapter in PEFT's form.

    Raises:
      BackendError: it does not.
    """
    path = folder / "adapter_config.json"
    try:
        json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BackendError(f"{path}: not readable JSON ({error})") from None
    shapes(folder)


def fingerprint(folder: Path) -> str:
    """Tells files apart by path, size and time of writing, without reading gigabytes."""
    stats = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return json.dumps([str(folder.resolve()), *((n, s.st_size, s.st_mtime_ns) for n, s in stats)])


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a scalar"
