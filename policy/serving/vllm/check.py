"""What a vLLM server must do to be learned from, checked once per run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from policy.serving.backend import RefusedError
from policy.serving.client import Client, Endpoint, MalformedError, member
from worldmodel.errors import InputError

_LOG = logging.getLogger(__name__)

UNKNOWN = -9999.0
"""Stands for a log-probability that vLLM does not have, or cannot write as JSON."""

PLAIN_SAMPLING: Mapping[str, float] = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sent with every request: a server may have taken others from the model's generation_config."""

_CANDIDATES = 20  # vLLM's own limit
_CLEAR = 0.01  # nats; what differs by less does not tell distributions apart
_WARM, _HALF = 2.0, 0.5  # temperature and top-p of the probes


async def is_vllm(client: Client) -> bool:
    """Whether an endpoint is a vLLM server that gives tokens and turns them into text.

    Raises:
      BackendError: it could not be reached.
    """
    try:
        if not await client.get("/v1/models", _is_of_vllm):
            return False
    except RefusedError:  # not every endpoint lists its models
        return False
    try:
        await detokenize(client, (1,))
    except RefusedError as error:
        _LOG.warning("a vLLM server whose tokens cannot be read, only its text: %s", error)
        return False
    return True


async def detokenize(client: Client, ids: tuple[int, ...]) -> str:
    """The text of tokens, marks of calls and thoughts included.

    Raises:
      BackendError: the server could not be reached, or has no such path.
    """
    if not ids:
        return ""
    body = {"model": client.endpoint.model, "tokens": list(ids)}
    return await client.post("/detokenize", body, lambda found: member(found, "prompt", str))


async def check_logprobs(client: Client) -> None:
    """Makes sure that log-probabilities are those of the distribution that was drawn from.

    Three requests of one token: the next token at temperature 1, at temperature 2, where logits
    are halved, and with a top-p of one half, where what is kept gets its share of the rest.

    Raises:
      InputError: they are others; says how to start the server.
      BackendError: it could not be reached.
    """
    plain = await _next_token(client, 1.0, 1.0)
    warm = await _next_token(client, _WARM, 1.0)
    kept = await _next_token(client, 1.0, _HALF)
    top = max(plain, key=plain.__getitem__)
    mass = sum(map(math.exp, plain.values()))
    if max(plain.values()) > _CLEAR or mass > 1.0 + _CLEAR:
        raise _refusal(client, "they are no log-probabilities at all")
    if top in warm:
        both = [token for token in plain if token in warm]
        behind = {token: plain[token] - plain[top] for token in both}
        found = {token: warm[token] - warm[top] for token in both}
        spread = max(abs(gap - gap / _WARM) for gap in behind.values())
        error = max(abs(found[token] - behind[token] / _WARM) for token in both)
        if spread > _CLEAR and error > spread / 2:
            raise _refusal(client, f"at temperature {_WARM:g} off by {error:.2f} nats")
    share = min(1.0, _HALF + math.exp(plain[top]))  # kept at most
    gained = max((kept[t] - plain[t] for t in kept if t in plain), default=0.0)
    if -math.log(share) > _CLEAR and gained < -math.log(share) / 2:
        raise _refusal(client, f"with top_p {_HALF:g} off by {-math.log(share) - gained:.2f} nats")


async def check_server(endpoint: Endpoint, *, key: str | None = None) -> bool:
    """Whether an endpoint is a vLLM server; its log-probabilities are checked if it is.

    Raises:
      InputError: they are not those of the distribution that was drawn from.
      BackendError: it could not be reached.
    """
    client = Client(endpoint, key=key)
    try:
        found = await is_vllm(client)
        if found:
            await check_logprobs(client)
        return found
    finally:
        await client.close()


async def require_logprobs(endpoint: Endpoint, *, key: str | None = None) -> None:
    """`check_logprobs` with a connection of its own."""
    client = Client(endpoint, key=key)
    try:
        await check_logprobs(client)
    finally:
        await client.close()


async def _next_token(client: Client, temperature: float, top_p: float) -> dict[str, float]:
    """Log-probabilities of the likeliest next tokens, by name, without those that are cut off."""
    body: dict[str, object] = {
        "model": client.endpoint.model,
        "prompt": [1, 1],
        "max_tokens": 1,
        "temperature": temperature,
        "top_p": top_p,
        "seed": 0,
        "logprobs": _CANDIDATES,
        "return_tokens_as_token_ids": True,
        **PLAIN_SAMPLING,
    }
    return await client.post("/v1/completions", body, _candidates)


def _candidates(found: object) -> dict[str, float]:
    choices = member(found, "choices", list)
    tops = member(member(choices[0] if choices else None, "logprobs", dict), "top_logprobs", list)
    if not tops or not isinstance(tops[0], dict):
        raise MalformedError("no top_logprobs")
    named = {name: float(member(tops[0], name, (int, float))) for name in tops[0]}
    named = {name: value for name, value in named.items() if value > UNKNOWN}
    if not named:
        raise MalformedError("no candidate has a log-probability")
    return named


def _is_of_vllm(found: object) -> bool:
    models = found.get("data") if isinstance(found, dict) else None
    return isinstance(models, list) and any(
        isinstance(model, dict) and model.get("owned_by") == "vllm" for model in models
    )


def _refusal(client: Client, what: str) -> InputError:
    return InputError(
        f"{client.endpoint.root}: its log-probabilities are not those of the distribution that "
        f"tokens are drawn from ({what}); start the server with `sepsis-jax policy serve`, or "
        "with --logprobs-mode processed_logprobs"
    )
