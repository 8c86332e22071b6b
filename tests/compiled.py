"""Compiling the same program once for all runs of a test module."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextmanager
def compilation_cached(folder: Path) -> Iterator[None]:
    """Keeps compiled programs in `folder` while the block runs."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def use(values: dict) -> None:
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)

    use(settings)
    try:
        yield
    finally:
        use(before)
