"""A vLLM server as a child process: started, watched, and gone when its starter is."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from policy.serving.backend import BackendError
from policy.serving.vllm.command import (
    PLUGINS,
    ServerOptions,
    ServingEnvironment,
    check_options,
    command,
    find_environment,
    make_key,
    variables,
)

Progress = Callable[[str, float], None]

_STAGES = (  # what vLLM writes, what it is about, share of the start that is over then
    ("non-default args", "importing", 0.1),
    ("Initializing a V1 LLM engine", "starting the engine", 0.4),
    ("Starting to load model", "loading weights", 0.6),
    ("Loading weights took", "making the cache", 0.7),
    ("Available routes are", "opening", 0.85),
)
_POLL_S = 0.25
_TELLING = re.compile(r"\w(Error|Exception): \S|died unexpectedly|error: argument")
_SHOWN = 4  # of the telling lines


class ServerError(BackendError):
    """The server did not start, or is no longer there; the message ends with its last lines."""


class VLLMServer:
    """One server; a context manager, plain or asynchronous.

    The key goes to the server by environment and is in no command line, log or message. Servers
    lead a process group of their own, which ends with this object, this process or its crash.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        environment: ServingEnvironment | None = None,
        key: str | None = None,
        log: Path | None = None,
        timeout_s: float = 900.0,
        grace_s: float = 10.0,
    ) -> None:
        """Prepares a server and starts nothing.

        Args:
          options: what is served, and how.
          environment: where vLLM is installed; found if not given.
          key: that clients must send; default: $VLLM_API_KEY, else a new one.
          log: file that gets what the server writes, after what it holds; default: a new one in
            the folder of temporary files.
          timeout_s: how long a start may take, in seconds.
          grace_s: time to stop in before it is killed, in seconds.

        Raises:
          InputError: the options are bad, or there is no serving environment.
        """
        check_options(options)
        self.options = options
        self.environment = environment or find_environment()
        self.key = key or make_key()
        self.port = options.port
        self.log = log
        self._timeout_s, self._grace_s = timeout_s, grace_s
        self._progress: Progress = _silent
        self._begin = 0
        self._guard: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"VLLMServer({self.options.served_name!r}, {self.url})"

    @property
    def url(self) -> str:
        """Root of the server's paths, without /v1."""
        host = self.options.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Leader of the server's process group; None if it was not started."""
        return self._guard.pid if self._guard else None

    @property
    def alive(self) -> bool:
        """Whether the process runs; it may not answer yet."""
        return self._guard is not None and self._guard.poll() is None

    def check(self) -> None:
        """Makes sure that the process runs.

        Raises:
          ServerError: it does not.
        """
        if not self.alive:
            raise ServerError(f"the vLLM server is not running; {self._last_words()}")

    def start(self, progress: Progress | None = None) -> None:
        """Starts the server and waits until it answers; again on the same port after it died.

        Args:
          progress: called with the phase and the share done, 0 to 1.

        Raises:
          ServerError: it died or was late; it is stopped then.
        """
        if self.alive:
            return
        self._progress = progress or _silent
        self.port = self.port or _free_port(self.options.host)
        if self.log is None:
            handle, name = tempfile.mkstemp(prefix="vllm-", suffix=".log")
            os.close(handle)
            self.log = Path(name)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        words = command(self.environment, self.options, self.port)
        guard = [sys.executable, "-I", str(PLUGINS / "guard.py")]
        with self.log.open("ab") as log:
            self._begin = log.tell()
            self._guard = subprocess.Popen(
                [*guard, str(os.getpid()), str(self._grace_s), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables(self.environment, self.options, self.key),
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server and all of its processes; may be called at any time, more than once."""
        if self._guard is None:
            return
        if self._guard.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._guard.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(self._grace_s + 5.0)
        # The guard ends its group as its last act, unless it was killed itself.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.wait()

    def tail(self, lines: int = 12) -> str:
        """The last lines that the server wrote since it was started, without the key."""
        return "\n".join(self._written().splitlines()[-lines:])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self.start)
        except BaseException:  # a cancelled wait leaves its thread behind; this ends it
            self.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.stop)

    def _wait(self) -> None:
        begun = time.monotonic()
        while not self._answers("GET", "/health"):
            self._told(begun)
        self._progress("first tokens", 0.9)
        # The first tokens take seconds: kernels are made when they are first used.
        request = {
            "model": self.options.served_name,
            "prompt": [1, 1],
            "max_tokens": 2,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 0,
            "logprobs": 1,
        }
        while not self._answers("POST", "/v1/completions", request):
            self._told(begun)
        self._progress("ready", 1.0)

    def _told(self, begun: float) -> None:
        """Tells of the progress, then sleeps; raises if the server died or is late."""
        if not self.alive:
            raise ServerError(f"the vLLM server died while starting; {self._last_words()}")
        if time.monotonic() - begun > self._timeout_s:
            raise ServerError(
                f"the vLLM server did not answer within {self._timeout_s:.0f} s; "
                f"{self._last_words()}"
            )
        written = self._written()
        reached = [(what, share) for mark, what, share in _STAGES if mark in written]
        self._progress(*(reached[-1] if reached else ("starting", 0.0)))
        time.sleep(_POLL_S)

    def _answers(self, method: str, path: str, body: dict[str, object] | None = None) -> bool:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.options.host, self.options.host)
        # Not urllib, which might ask a proxy.
        connection = http.client.HTTPConnection(host, self.port, timeout=60.0 if body else 5.0)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            connection.connect()
            if connection.sock.getsockname() == connection.sock.getpeername():
                return False  # a free port of this machine may be given its own caller
            connection.request(method, path, json.dumps(body) if body else None, headers)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _written(self) -> str:
        if self.log is None or not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(self._begin)
            return log.read().decode(errors="replace").replace(self.key, "***")

    def _last_words(self) -> str:
        # vLLM goes on for pages after what matters.
        lines = self._written().splitlines()
        telling = [line for line in lines if _TELLING.search(line) and "WARNING" not in line]
        return "\n".join([f"log: {self.log}", *telling[:_SHOWN], "its last lines:", self.tail()])


def _silent(phase: str, share: float) -> None:
    """Reports no progress."""


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        result: int = probe.getsockname()[1]
        return result
