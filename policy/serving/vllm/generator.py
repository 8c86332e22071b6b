"""Token ids in, token ids out, over vLLM's `/inference/v1/generate`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from policy.serving.backend import LENGTH, STOP, BackendError, Completion, Sampling
from policy.serving.client import Client, Endpoint, MalformedError, integers, member
from policy.serving.vllm.check import PLAIN_SAMPLING, UNKNOWN

_CANDIDATES = 127  # vLLM takes one more; `--max-logprobs` of the servers started here too
_ROUNDS = 8  # a score whose parts met different weights is asked for again


class VLLMGenerator:
    """A `Generator` behind a vLLM server that was started with `--enable-scale-out`.

    Log-probabilities are of the distribution that was drawn from where the server runs with
    `--logprobs-mode processed_logprobs`, which `check_logprobs` checks; at temperature 0 they are
    those at temperature 1.

    Attributes:
      weight_version: of the last reply; it salts the server's prefix cache. Set it after a swap,
        and what other weights left there is never used, even if it was not cleared.
    """

    def __init__(self, endpoint: Endpoint, *, key: str | None = None) -> None:
        """Opens no connection yet.

        Args:
          endpoint: the server.
          key: instead of the endpoint's variable or file.

        Raises:
          InputError: the URL or the key is missing.
        """
        self.name = endpoint.model
        self.weight_version: str | None = None
        self._adapter: str | None = None
        self._client = Client(endpoint, key=key)

    def use_adapter(self, name: str) -> None:
        """Speaks with a loaded LoRA adapter from now on, whose name tags all tokens.

        The server tags them with the version of the weights beneath.
        """
        self.name = self.weight_version = self._adapter = name

    async def generate(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, seed: int
    ) -> Completion:
        """Draws tokens until a stop token or the limit; see `Generator.generate`.

        Raises:
          BackendError: the model could not be reached, or the prompt does not fit.
        """
        completion, _ = await self._generate(
            prompt_ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_completion_length,
            seed=seed % 2**63,
            logprobs=0,
        )
        return completion

    async def score(
        self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """Summed log-probability of each continuation after the prompt, at temperature 1.

        Shared beginnings are read once: each distinct beginning asks for its next tokens alone,
        and the server's prefix cache holds the rest. All parts come from one version of the
        weights.

        Raises:
          BackendError: the model could not be reached, or its weights changed all the time.
        """
        following: dict[tuple[int, ...], set[int]] = {}
        for continuation in continuations:
            for i, token in enumerate(continuation):
                following.setdefault(tuple(continuation[:i]), set()).add(token)
        for _ in range(_ROUNDS if following else 0):
            # The prompt first and alone, so that the others find it in the cache.
            first = await self._next(prompt_ids, (), following[()])
            rest = await asyncio.gather(
                *(self._next(prompt_ids, start, next_) for start, next_ in following.items()
                  if start)
            )  # fmt: skip
            parts = [first, *rest]
            if len({version for _, _, version in parts}) == 1:
                found = {start: logprobs for start, logprobs, _ in parts}
                return [
                    sum(found[tuple(c[:i])][token] for i, token in enumerate(c))
                    for c in continuations
                ]
        if not following:
            return [0.0] * len(continuations)
        raise BackendError(f"{self.name}: the weights changed during {_ROUNDS} scores in a row")

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _next(
        self, prompt_ids: Sequence[int], start: tuple[int, ...], candidates: set[int]
    ) -> tuple[tuple[int, ...], dict[int, float], str | None]:
        """Log-probabilities of single tokens after a prompt and a beginning."""
        wanted = sorted(candidates)
        if len(wanted) > _CANDIDATES:
            raise BackendError(f"{len(wanted)} next tokens to score; at most {_CANDIDATES}")
        # One more than wanted, twice the last: vLLM 0.32 sends as many as it was asked for but
        # counts the token that it drew, which crowds out the last one.
        asked = [*wanted, wanted[-1]]
        completion, seen = await self._generate(
            [*prompt_ids, *start],
            temperature=1.0,
            top_p=1.0,
            max_tokens=1,
            seed=0,
            logprobs=len(asked),
            logprob_token_ids=asked,
        )
        return start, seen, completion.weight_version

    async def _generate(
        self,
        prompt_ids: Sequence[int],
        **params: Any,  # of vLLM, of several types
    ) -> tuple[Completion, dict[int, float]]:
        wanted = params.get("logprob_token_ids", ())
        body: dict[str, object] = {
            "model": self.name,
            "token_ids": list(prompt_ids),
            "sampling_params": {**PLAIN_SAMPLING, **params, "detokenize": False},
        }
        if self.weight_version is not None:
            body["cache_salt"] = self.weight_version

        def read(found: object) -> tuple[Completion, dict[int, float]]:
            completion, seen = _completion(found)
            if missing := set(wanted) - seen.keys():
                raise MalformedError(f"no log-probability of tokens {sorted(missing)}")
            return completion, seen

        adapter = self._adapter
        completion, seen = await self._client.post("/inference/v1/generate", body, read)
        if adapter is not None:
            completion = replace(completion, weight_version=adapter)
        self.weight_version = completion.weight_version
        return completion, seen


def _completion(found: object) -> tuple[Completion, dict[int, float]]:
    """A reply, and the log-probabilities of the candidates for its first token."""
    choices = member(found, "choices", list)
    if len(choices) != 1:
        raise MalformedError(f"{len(choices)} choices")
    choice = choices[0]
    tokens = integers(member(choice, "token_ids", list), "token_ids")
    finish = member(choice, "finish_reason", str)
    if finish not in (STOP, LENGTH):  # aborted
        raise MalformedError(f"ended by {finish}")
    entries = member(member(choice, "logprobs", dict), "content", list)
    drawn = [(member(e, "token_id", int), _logprob(e)) for e in entries]
    if tuple(token for token, _ in drawn) != tokens or not tokens:
        raise MalformedError("log-probabilities of other tokens than those drawn")
    if any(logprob <= UNKNOWN for _, logprob in drawn):
        raise MalformedError("a token was drawn without a log-probability")
    first = member(entries[0], "top_logprobs", list)
    seen = dict(drawn[:1]) | {member(e, "token_id", int): _logprob(e) for e in first}
    completion = Completion(tokens, tuple(p for _, p in drawn), finish, _version(choice))
    return completion, seen


def _logprob(entry: object) -> float:
    return float(member(entry, "logprob", (int, float)))


def _version(choice: Mapping[str, object]) -> str | None:
    """The one version of the weights that drew the tokens; None if the server does not tell."""
    if not choice.get("weight_versions"):
        return None
    spans = member(choice, "weight_versions", list)
    versions = [member(span, "version", str) for span in spans]
    if len(set(versions)) > 1:
        raise MalformedError(f"tokens of several versions of the weights: {', '.join(versions)}")
    return versions[0]
