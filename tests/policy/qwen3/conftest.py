"""Tiny folders, made once per module that asks."""

import pytest

from policy import qwen3
from policy.testing.tiny_qwen3 import make_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tied, theta 1e6; weights large enough for distributions that are far from flat."""
    return make_tiny(tmp_path_factory.mktemp("qwen3") / "tiny", initializer_range=0.1)


@pytest.fixture(scope="module")
def model(folder):
    return qwen3.load(folder)


@pytest.fixture(scope="module")
def one_torch_thread():
    """torch's threads wait by spinning, which takes minutes where cores are shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
