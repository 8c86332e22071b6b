"""Tests that need vLLM itself."""

import pytest

from policy.serving.vllm import find_environment
from worldmodel.errors import InputError

try:
    find_environment()
    _missing = ""
except InputError as error:
    _missing = str(error)

NEEDS_VLLM = [pytest.mark.vllm, pytest.mark.skipif(bool(_missing), reason=_missing)]
"""Marks of a module."""
