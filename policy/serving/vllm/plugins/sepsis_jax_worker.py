"""What vLLM's workers lack for swaps of weights; loaded with `--worker-extension-cls`.

vLLM 0.32 on a CPU multiplies with packed copies of weights. Its `reload_weights` packs all anew
but that of an output projection which is tied to the embeddings, and its checksums see none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any


class WeightTools:
    """Methods that join those of every worker; the server refuses names that a worker has."""

    def sepsis_jax_swap(self, folder: str) -> None:
        """Loads the weights of a folder, packed copies included."""
        # a worker of vLLM, whose classes are not imported here
        worker: Any = self
        worker.reload_weights(weights_path=folder)
        for name, module in self._sepsis_jax_packed():
            if not module.weight.numel():
                continue  # no original is kept, so the reload packed this one itself
            if module.weight.is_meta:
                raise RuntimeError(f"{name}: without values after loading {folder}")
            module.quant_method.process_weights_after_loading(module)

    def sepsis_jax_packed_checksums(self) -> dict[str, str]:
        """SHA-256 by name of what packed weights make of a fixed input."""
        import torch

        sums = {}
        for name, module in self._sepsis_jax_packed():
            # An emptied weight has no width; linear layers and embeddings keep it.
            width = getattr(module, "input_size_per_partition", None) or module.embedding_dim
            dtype = module.weight.dtype
            probe = torch.sin(torch.arange(1, width + 1, dtype=torch.float32)).to(dtype)
            with torch.inference_mode():
                made = module.cpu_linear(probe[None], module.weight, None)
            sums[name] = hashlib.sha256(made.float().contiguous().numpy().tobytes()).hexdigest()
        return sums

    def _sepsis_jax_packed(self) -> Iterator[tuple[str, Any]]:
        worker: Any = self
        for name, module in worker.model_runner.get_model().named_modules():
            if hasattr(module, "cpu_linear"):
                yield name, module
