"""A world model in torch at the same weights: what a rollout is compared with.

torch is an optional extra, loaded when it is asked for. The modules are `torch.nn`'s own, in eager
mode with `nn.GRU`; for `torch.compile` the window is unrolled, so that the compiler sees through
it and joins the gates.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import jax
import numpy as np

from worldmodel import schema
from worldmodel.models.clinical_model import LOG_SIGMA_RANGE
from worldmodel.models.world_model import WorldModel

Tensor = Any  # torch.Tensor, for readers without torch


def torch_installed() -> bool:
    """Whether torch can be loaded."""
    return find_spec("torch") is not None


def load_torch(precision: str) -> Any:
    """The torch library, set to multiply as JAX does at `precision`."""
    torch = importlib.import_module("torch")
    # cuDNN's recurrent layers take TF32 by default, plain products do not, JAX's "default" does.
    reduced = precision == "default"
    torch.backends.cuda.matmul.allow_tf32 = reduced
    torch.backends.cudnn.allow_tf32 = reduced
    return torch


class _Trunk:
    """Embeddings, GRU and linear layers of one model."""

    def __init__(self, torch: ModuleType, model: Any, device: str, *, unrolled: bool):
        def tensor(parameter: Any, *, transposed: bool = False) -> Tensor:
            value = np.asarray(parameter[...])
            return torch.tensor(value.T.copy() if transposed else value, device=device)

        self.torch, self.unrolled = torch, unrolled
        self.linears = {
            name: (tensor(layer.kernel, transposed=True), tensor(layer.bias))
            for name in _LINEARS
            if (layer := getattr(model, name, None)) is not None
        }
        cells = list(model.gru.cells)
        config = model.config
        self.gru = torch.nn.GRU(config.row_width, config.hidden, len(cells), batch_first=True)
        self.gru.to(device).eval()
        with torch.no_grad():
            for layer, cell in enumerate(cells):
                for jax_name, torch_name in (("input", "ih"), ("hidden", "hh")):
                    weight = getattr(cell, f"weight_{jax_name}")
                    bias = getattr(cell, f"bias_{jax_name}")
                    getattr(self.gru, f"weight_{torch_name}_l{layer}").copy_(
                        tensor(weight, transposed=True)
                    )
                    getattr(self.gru, f"bias_{torch_name}_l{layer}").copy_(tensor(bias))
        # Apart from the module, into which the compiler does not look.
        self.layers = [[weight.detach() for weight in weights] for weights in self.gru.all_weights]
        # Embedded once: 25 joint actions, and the empty rows before admission at index -1.
        levels = np.eye(schema.NUM_LEVELS, dtype=np.float32)
        pairs = [np.concatenate([levels[v], levels[f]]) for v in range(5) for f in range(5)]
        self.pairs = torch.tensor(np.stack([*pairs, np.zeros(10, np.float32)]), device=device)
        self.actions = self.linear("act_embed", self.pairs)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear layer by its name."""
        return self.torch.nn.functional.linear(x, *self.linears[name])

    def embed(self, static: Tensor) -> Tensor:
        """[B, 3] to [B, embed]."""
        return self.linear("static_embed", static)

    def encode(self, obs: Tensor, observed: Tensor, static: Tensor, action: Tensor) -> Tensor:
        """A row [..., 39 + 38 + 2 embed] as the GRU reads it; `static` is embedded already."""
        return self.torch.cat([obs, observed, static, self.actions[action]], -1)

    def last_hidden(self, window: Tensor) -> Tensor:
        """The top layer's last hidden state [B, H] of a window [B, W, F]."""
        if not self.unrolled:
            return self.gru(window)[0][:, -1]
        torch = self.torch
        linear = torch.nn.functional.linear
        sequence = window.transpose(0, 1)
        h: Tensor = None
        for weight_input, weight_hidden, bias_input, bias_hidden in self.layers:
            projected = linear(sequence, weight_input, bias_input)
            rows = []
            h = None
            for side in projected:
                r, z, n = side.chunk(3, -1)
                # From h = 0 the hidden side is its bias alone.
                hidden = bias_hidden if h is None else linear(h, weight_hidden, bias_hidden)
                hidden_r, hidden_z, hidden_n = hidden.chunk(3, -1)
                r, z = torch.sigmoid(r + hidden_r), torch.sigmoid(z + hidden_z)
                n = torch.tanh(n + r * hidden_n)
                h = n - z * n if h is None else n + z * (h - n)
                rows.append(h)
            sequence = torch.stack(rows)
        return h


_LINEARS = (
    "static_embed", "act_embed", "vent_hidden", "vent_out", "trans_pre", "mu_head",
    "log_sigma_head", "autoregression", "outcome_hidden", "outcome_out",
)  # fmt: skip


class TorchModels:
    """State and Outcome Model of a world model's first member.

    Args:
      torch: from `load_torch`.
      world_model: whose weights are copied.
      device: of torch.
      unrolled: write the GRU's steps out, for `torch.compile`.
    """

    def __init__(self, torch: ModuleType, world_model: WorldModel, device: str, *, unrolled: bool):
        def first(model: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[0], model)

        state = first(world_model.state_model)
        self.torch, self.config = torch, world_model.config
        self.state = _Trunk(torch, state, device, unrolled=unrolled)
        self.outcome = _Trunk(torch, first(world_model.outcome_model), device, unrolled=unrolled)
        self.residual = world_model.config.variant == "residual"
        self.offset = None
        if self.residual:
            self.offset = torch.tensor(np.asarray(state.log_sigma_offset[...]), device=device)

    def predict(self, window: Tensor, newest: Tensor, static: Tensor) -> tuple[Tensor, ...]:
        """Mean [B, 39], log sigma [B, 39] and ventilation logit [B] of the next row.

        Args:
          window: [B, 6, F] encoded rows.
          newest: [B, linear_rows, 87] rows as the autoregression reads them; the reference
            variant reads none.
          static: [B, 3] scaled.
        """
        torch, model = self.torch, self.state
        h = model.last_hidden(window)
        vent = model.linear("vent_out", torch.relu(model.linear("vent_hidden", h)))
        pre = torch.cat([h, torch.sigmoid(vent)], -1)
        pre = torch.relu(model.linear("trans_pre", pre))
        mu, log_sigma = model.linear("mu_head", pre), model.linear("log_sigma_head", pre)
        if self.residual:
            flat = torch.cat([newest.flatten(1), static], -1)
            mu = newest[:, -1, : schema.NUM_FEATURES] + model.linear("autoregression", flat) + mu
            low, high = LOG_SIGMA_RANGE
            log_sigma = low + (high - low) * torch.sigmoid(log_sigma) + self.offset
        return mu, log_sigma, vent[:, 0]

    def mortality(self, obs: Tensor, observed: Tensor, static: Tensor, action: Tensor) -> Tensor:
        """Probability [B] of death within 90 days; arguments [B, 12, ...], actions as indices."""
        model = self.outcome
        embedded = model.embed(static)[:, None].expand(-1, obs.shape[1], -1)
        h = model.last_hidden(model.encode(obs, observed, embedded, action))
        hidden = self.torch.relu(model.linear("outcome_hidden", h))
        return self.torch.sigmoid(model.linear("outcome_out", hidden)[:, 0])
