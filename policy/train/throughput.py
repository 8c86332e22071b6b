"""Tokens per second, and what share of the devices' arithmetic they are (MFU).

Model FLOPs are counted as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): 6 per
token and parameter that is multiplied by, and 12 x layers x heads x head_dim x length per token
for attention, as if it were not causal. What is computed again to save memory does not count.
"""

from __future__ import annotations

import jax

from policy.qwen3.config import Qwen3Config

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; the first name that a
# device's kind contains.
_PEAKS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("v6 lite", 918e12),
    ("v6e", 918e12),
    ("v5 lite", 197e12),
    ("v5e", 197e12),
    ("v5", 459e12),
)


def peak_flops(kind: str | None = None) -> float | None:
    """bfloat16 FLOP/s of one device; None if unknown, as for CPUs.

    Args:
      kind: such as "NVIDIA H200" or "TPU v5 lite"; that of the first device if not given.
    """
    kind = jax.devices()[0].device_kind if kind is None else kind
    return next((peak for name, peak in _PEAKS if name.lower() in kind.lower()), None)


def multiplied(config: Qwen3Config) -> int:
    """Parameters that a token is multiplied by: all but norms and the table of embeddings.

    The output projection counts, whether it shares the table or not.
    """
    inner = config.num_attention_heads * config.head_dim
    outer = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * inner + 2 * outer + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer + config.hidden_size * config.vocab_size


def flops_per_token(config: Qwen3Config, length: float, *, adapters: bool = False) -> float:
    """Model FLOPs of training on one token, forward and backward.

    Args:
      config: of the model.
      length: tokens that attend to one another: a row's, or those of a dialogue in packed rows.
      adapters: only low-rank adapters are trained, so that the products which make the gradients
        of matrices (a third of all but attention's) are not needed.
    """
    products = (4 if adapters else 6) * multiplied(config)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return products + attention * length


class Throughput:
    """Moving averages of speed.

    Args:
      flops: of one token, as of `flops_per_token`.
      peak: FLOP/s of all devices together; None leaves MFU out.
      decay: weight of what was before, at each update.
    """

    def __init__(self, flops: float, peak: float | None, *, decay: float = 0.9):
        self._flops, self._peak, self._decay = flops, peak, decay
        self._tokens = self._seconds = 0.0
        self._first = True

    def update(self, tokens: float, seconds: float) -> dict[str, float]:
        """Adds what was just measured.

        Args:
          tokens: read, padding apart.
          seconds: that took. The first measurement includes compilation and does not count.

        Returns:
          `read_per_s` tokens and, where the peak is known, `mfu`; nothing at first.
        """
        if self._first:
            self._first = False
            return {}
        self._tokens = self._decay * self._tokens + tokens
        self._seconds = self._decay * self._seconds + seconds
        speed = self._tokens / self._seconds
        mfu = {} if self._peak is None else {"mfu": speed * self._flops / self._peak}
        return {"read_per_s": speed} | mfu
