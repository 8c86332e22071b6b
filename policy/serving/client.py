"""HTTP client for JSON endpoints, with retries and validated replies.

A reply that is truncated, is not JSON or has the wrong types is retried like a dropped connection,
and no part of it is used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from policy.serving.backend import BackendError, ContextError, RefusedError, unique_names
from worldmodel.errors import InputError

if TYPE_CHECKING:
    import openai

_LOG = logging.getLogger(__name__)
_AWAY = (502, 503, 504)  # statuses of proxies and starting servers
_TRY_AGAIN = (408, 409, 425, 429)
_QUOTED = 500  # characters of an endpoint's reply that are quoted in errors

T = TypeVar("T")


class MalformedError(Exception):
    """Raised by readers for a reply of an unexpected form; the request is retried."""


@dataclass(frozen=True)
class Endpoint:
    """Address of a model server, and limits of retries."""

    url: str  # with or without /v1
    model: str
    key_variable: str | None = None  # environment variable with the key; None sends none
    key_file: Path | None = None  # file with the key, where the variable is not set
    timeout_s: float = 600.0  # of one try
    attempts: int = 6  # failed tries at most, those without a server not counted
    patience_s: float = 300.0  # how long a server may be unreachable
    first_wait_s: float = 0.5  # doubles with every fault, up to `longest_wait_s`
    longest_wait_s: float = 20.0
    concurrency: int = 256  # requests at a time

    @property
    def root(self) -> str:
        """The URL without /v1."""
        return self.url.rstrip("/").removesuffix("/v1")

    def read_key(self) -> str:
        """The key, or "" if none is configured.

        Raises:
          InputError: neither the variable nor the file holds one.
        """
        if self.key_variable is None and self.key_file is None:
            return ""
        key = os.environ.get(self.key_variable or "", "")
        if not key and self.key_file is not None and self.key_file.is_file():
            key = self.key_file.read_text().strip()
        if not key:
            places = [f"${self.key_variable}"] if self.key_variable else []
            places += [str(self.key_file)] if self.key_file else []
            raise InputError(f"{self.url}: no key in {' or '.join(places)}; put it there")
        return key


@dataclass
class _FaultError(Exception):
    what: str
    away: bool = False
    after_s: float = 0.0  # the Retry-After of the endpoint


class Client:
    """Connections to one endpoint; many requests at once."""

    def __init__(self, endpoint: Endpoint, *, key: str | None = None) -> None:
        """Opens no connection yet.

        Args:
          endpoint: of the requests.
          key: instead of the endpoint's variable or file.

        Raises:
          InputError: the URL or the key is missing.
        """
        if urlsplit(endpoint.url).scheme not in ("http", "https"):
            raise InputError(f"{endpoint.url!r}: expected a URL like http://127.0.0.1:8000/v1")
        self.endpoint = endpoint
        self._key = endpoint.read_key() if key is None else key
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._openai: openai.AsyncOpenAI | None = None
        self._troubled = False
        self._answered = 0.0  # when a request was last answered

    async def post(
        self,
        path: str,
        body: Mapping[str, object] | None,
        read: Callable[[object], T],
        *,
        query: Mapping[str, str] | None = None,
    ) -> T:
        """Sends JSON and reads the reply.

        Args:
          path: from the root, like /v1/completions.
          body: what to send; None sends nothing.
          read: makes the result of the decoded JSON; raises `MalformedError` where it cannot.
          query: parameters of the URL.

        Raises:
          RefusedError: at once, where a retry cannot help.
          BackendError: after all tries.
        """
        found: T = await self._with_retries("POST", path, body, read, query or {})
        return found

    async def tell(self, path: str, body: Mapping[str, object]) -> None:
        """Like `post`, for endpoints whose body does not matter."""
        await self._with_retries("POST", path, body, None, {})

    async def get(self, path: str, read: Callable[[object], T]) -> T:
        """Like `post`, without a body."""
        found: T = await self._with_retries("GET", path, None, read, {})
        return found

    async def close(self) -> None:
        """Closes the connections."""
        if self._openai is not None:
            await self._openai.close()
            self._openai = None

    async def _with_retries(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None,
        read: Callable[[object], T] | None,
        query: Mapping[str, str],
    ) -> Any:  # what `read` made of the reply
        endpoint = self.endpoint
        faults = failures = 0
        away_since: float | None = None
        while True:
            began = 0.0
            try:
                async with self._slots:
                    began = time.monotonic()
                    text = await self._once(method, path, body, query)
                found = _read(text, read) if read else None
                self._answered = time.monotonic()
                if self._troubled:
                    self._troubled = False
                    _LOG.info("%s answers again", endpoint.root)
                return found
            except _FaultError as fault:
                now = time.monotonic()
                faults += 1
                failures += not fault.away
                away_since = (away_since or now) if fault.away else None
                absent = away_since is not None and now - away_since >= endpoint.patience_s
                what = f"{endpoint.root}{path}: {self._clean(fault.what)}"
                if absent or failures >= endpoint.attempts:
                    raise BackendError(f"{what} (after {faults} tries)") from None
                wait = min(endpoint.longest_wait_s, endpoint.first_wait_s * 2 ** min(faults - 1, 9))
                wait = max(fault.after_s, wait * random.uniform(0.5, 1.0))
                # One warning for a server that is gone, not one per waiting request, and none for
                # a request that was sent before another was answered.
                late = began < self._answered
                level = logging.DEBUG if self._troubled or late else logging.WARNING
                self._troubled |= not late
                _LOG.log(level, "%s; another try in %.1f s", what, wait)
                await asyncio.sleep(wait)

    async def _once(
        self, method: str, path: str, body: Mapping[str, object] | None, query: Mapping[str, str]
    ) -> str:
        import openai

        client = self._openai = self._openai or self._connect()
        options: Any = {"params": dict(query)} if query else {}
        try:
            if method == "GET":
                return await client.get(path, cast_to=str, options=options)
            return await client.post(path, cast_to=str, body=body, options=options)
        except openai.APITimeoutError:
            raise _FaultError(f"no reply within {self.endpoint.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            named = f"{type(cause).__name__}: {cause}" if cause else str(error)
            raise _FaultError(f"no connection ({named})", away=True) from None
        except openai.APIStatusError as error:
            status, said = error.status_code, _first_words(error.response.text)
            what = f"status {status}{': ' if said else ''}{said}"
            if status >= 500 or status in _TRY_AGAIN:
                after = _seconds(error.response.headers.get("retry-after"))
                raise _FaultError(what, away=status in _AWAY, after_s=after) from None
            kind = ContextError if _is_too_long(status, error.response.text) else RefusedError
            raise kind(f"{self.endpoint.root}{path}: {self._clean(what)}") from None

    def _connect(self) -> openai.AsyncOpenAI:
        import openai

        # Proxies of the environment are not used for servers on this machine.
        local = is_loopback(urlsplit(self.endpoint.url).hostname or "")
        return openai.AsyncOpenAI(
            base_url=self.endpoint.root,
            api_key=self._key or "none",
            timeout=self.endpoint.timeout_s,
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if local else None,
        )

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


_TOO_LONG = re.compile(
    r"context_length_exceeded|maximum (context|model) length|max_model_len|context window", re.I
)


def _is_too_long(status: int, text: str) -> bool:
    """Whether a refusal says that the prompt does not fit, in the words of vLLM or OpenAI."""
    return status in (400, 413, 422) and _TOO_LONG.search(text) is not None


def _read(text: str, read: Callable[[object], T]) -> T:
    try:
        return read(json.loads(text, parse_constant=_refuse, object_pairs_hook=unique_names))
    except (ValueError, MalformedError) as error:
        raise _FaultError(f"malformed reply ({error}): {_first_words(text)}") from None


def _refuse(name: str) -> None:
    raise MalformedError(f"{name} is no number")


def _first_words(text: str) -> str:
    return " ".join(text[:_QUOTED].split())


def _seconds(text: str | None) -> float:
    """A Retry-After of at most a minute; dates and nonsense count as none."""
    try:
        return min(60.0, max(0.0, float(text or 0.0)))
    except ValueError:
        return 0.0


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def member(value: object, name: str, kind: type[T] | tuple[type[T], ...]) -> T:
    """A member of a JSON object, of the expected type.

    Raises:
      MalformedError: the value is no object, has no such member, or the member has another type.
    """
    if not isinstance(value, dict) or name not in value:
        raise MalformedError(f"no {name}")
    found = value[name]
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
        raise MalformedError(f"{name} is {type(found).__name__}")
    return found


def integers(value: object, name: str) -> tuple[int, ...]:
    """A list of integers.

    Raises:
      MalformedError: it is something else.
    """
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise MalformedError(f"{name} is no list of integers")
    return tuple(value)
