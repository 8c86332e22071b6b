"""Stage III in several processes is refused, in one line."""

import jax
import pytest

from sepsis_jax.pipelines.llm import rl
from worldmodel.errors import InputError


def test_several_processes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="2 processes; it runs in one"):
        rl.run_rl(tmp_path / "out", rl.RLOptions(), llm=tmp_path, model=tmp_path)
    assert not (tmp_path / "out").exists()
