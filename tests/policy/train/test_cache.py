"""Dialogues come back as they were, from a file that belongs to exactly what they depend on."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from policy.train.data import packing
from policy.train.data.packing import CachedDialogues, Dialogue, cached, pack
from policy.train.data.qa_sampling import QuestionConfig
from worldmodel.errors import InputError

CONFIG = QuestionConfig()


def some(count, seed=0):
    draw = np.random.default_rng(seed)
    found = []
    for length in draw.integers(1, 9, count):
        ids, own = draw.integers(0, 500, length).astype(np.int32), draw.random(length) < 0.5
        judged = int(own.sum() > 1)
        decides = np.array([[*np.flatnonzero(own)[:2], 7]] * judged, np.int32).reshape(-1, 3)
        values = draw.dirichlet(np.ones(25), judged).astype(np.float32).reshape(-1, 25)
        found.append(Dialogue(ids, own, decides, values))
    return found


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


@pytest.fixture
def made(tmp_path, tokenizer):
    """`cached` with defaults; counts how often dialogues are made."""
    calls = []

    def get(dialogues=None, **changes):
        def make():
            calls.append(1)
            yield from some(20) if dialogues is None else dialogues

        arguments = {"tokenizer": tokenizer, "source": "cohort", "settings": CONFIG} | changes
        return cached(tmp_path / "cache", make, **arguments)

    get.calls = calls
    return get


def assert_equal(found, dialogues):
    assert len(found) == len(dialogues)
    for one, other in zip(found, dialogues, strict=True):
        assert (one.ids.dtype, one.own.dtype) == (np.int32, np.bool_)
        assert one.ids.tolist() == other.ids.tolist()
        assert one.own.tolist() == other.own.tolist()
        assert one.decides.tolist() == other.decides.tolist()
        np.testing.assert_array_equal(one.judged, other.judged)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_what_was_written_is_read(made, monkeypatch, count):
    monkeypatch.setattr(packing, "BATCH", 8)
    dialogues = some(count)
    found = made(dialogues)
    assert_equal(found, dialogues)
    assert found.lengths.tolist() == [len(one) for one in dialogues]
    assert_equal(found[-3:], dialogues[-3:])
    assert found[-1].ids.tolist() == dialogues[-1].ids.tolist()
    with pytest.raises(IndexError):
        found[count]
    one, other = pack(found, 64, seed=1), pack(dialogues, 64, seed=1)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_it_is_mapped_and_cannot_be_changed(made):
    found = made()[3]
    assert not found.ids.flags.owndata and not found.own.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        found.ids[0] = 1


def test_made_once_and_again_where_something_changed(made, tokenizer, monkeypatch):
    first = made().path
    assert made().path == first and len(made.calls) == 1
    (tokenizer / "model.safetensors").write_text("other weights")
    assert made().path == first
    others = {
        made(source="other").path,
        made(settings=replace(CONFIG, count=7)).path,
        made(settings={"count": 7}).path,
    }
    (tokenizer / "tokenizer.json").write_text('{"a": 1}')
    others.add(made().path)
    (tokenizer / "chat_template.jinja").write_text("x")
    others.add(made().path)
    monkeypatch.setattr(packing, "_code", lambda: "other code")
    others.add(made().path)
    assert len(others | {first}) == 7 == len(made.calls)


def test_equal_bytes(made):
    path = made().path
    before = path.read_bytes()
    path.unlink()
    assert made().path == path
    assert path.read_bytes() == before


def test_half_a_file_never_appears(made, tmp_path):
    def broken():
        yield from some(3)
        raise RuntimeError("out of power")

    with pytest.raises(RuntimeError):
        made(broken())
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(InputError, match="no dialogue"):
        made([])
    assert not list((tmp_path / "cache").iterdir())


def test_damage_is_seen(made, tmp_path):
    path, other = made().path, made(source="other").path
    path.write_bytes(other.read_bytes())
    with pytest.raises(InputError, match="something else than its name says"):
        made()
    path.write_bytes(other.read_bytes()[:200])
    with pytest.raises(InputError, match=r"not readable .* delete it"):
        made()
    with pytest.raises(InputError, match="holds no tokenizer"):
        made(tokenizer=tmp_path)
    with pytest.raises(InputError, match="JSON"):
        made(settings={"where": tmp_path})
    assert len(CachedDialogues(other)) == 20
