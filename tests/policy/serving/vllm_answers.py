"""Answers as vLLM gives them to a reply of a given text, its lenient reading of calls included."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np

from policy.serving.tokens import ChatTokens

CALLS = re.compile("<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)


def hermes(text: str) -> tuple[str | None, list[dict]]:
    """Content and calls as vLLM's hermes parser finds them.

    It takes the last of doubled names, ignores further ones, needs no closing mark, and looks into
    thoughts; one piece that is no JSON makes all of the reply content.
    """
    if "<tool_call>" not in text:
        return text, []
    try:
        found = [json.loads(closed or unclosed) for closed, unclosed in CALLS.findall(text)]
        functions = [
            {"name": one["name"], "arguments": json.dumps(one["arguments"])} for one in found
        ]
    except (ValueError, KeyError, TypeError, RecursionError):
        return text, []
    calls = [{"id": f"c{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
    return text[: text.index("<tool_call>")] or None, calls


@dataclass
class FakeVLLM:
    """A server whose model says `text`, after prompts that end with `tail`."""

    tokens: ChatTokens
    text: str = ""
    tail: str = ""
    mode: str = "processed_logprobs"
    owner: str = "vllm"
    seed: int = 0

    def __call__(self, path: str, body: dict | None) -> dict:
        """The answer to a request."""
        return {
            "/v1/models": self._models,
            "/detokenize": self._detokenize,
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chat,
            "/inference/v1/generate": self._generate,
        }[path](body)

    def drawn(self) -> list[int]:
        """The tokens of the reply."""
        return [*self.tokens.encode(self.text), self.tokens.end_id]

    def _models(self, _: object) -> dict:
        return {"object": "list", "data": [{"id": "m", "owned_by": self.owner}]}

    def _detokenize(self, body: dict) -> dict:
        return {"prompt": self.tokens.text([*body["tokens"], self.tokens.end_id])}

    def _chat(self, body: dict) -> dict:
        ids = self.drawn()
        content, calls = hermes(self.text)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": content, "tool_calls": calls},
            "finish_reason": "tool_calls" if calls else "stop",
            "stop_reason": None,
        }
        answer: dict = {"choices": [choice]}
        if body.get("return_token_ids"):
            choice["token_ids"] = ids
            choice["logprobs"] = {"content": [{"logprob": -1.0} for _ in ids]}
            answer["prompt_token_ids"] = [1, 2, *self.tokens.encode(self.tail)]
        return answer

    def _generate(self, body: dict) -> dict:
        ids = self.drawn()
        entries = [{"token_id": t, "logprob": -1.0, "top_logprobs": []} for t in ids]
        choice = {"token_ids": ids, "finish_reason": "stop", "logprobs": {"content": entries}}
        return {"choices": [choice]}

    def _completions(self, body: dict) -> dict:
        """Log-probabilities of the next token among 500, as the server's mode has them."""
        logits = 3.0 * np.random.default_rng(self.seed).standard_normal(500)
        if self.mode.startswith("processed"):
            logits = logits / body["temperature"]
            order = np.argsort(-logits)
            chances = np.exp(logits[order]) / np.exp(logits).sum()
            dropped = np.cumsum(chances) - chances >= body["top_p"]
            logits[order[dropped]] = -np.inf
        shown = logits if self.mode.endswith("logits") else logits - np.log(np.exp(logits).sum())
        best = np.argsort(-shown)[: body["logprobs"]]
        top = {f"token_id:{t}": float(max(shown[t], -9999.0)) for t in best}
        return {"choices": [{"logprobs": {"top_logprobs": [top]}}]}
