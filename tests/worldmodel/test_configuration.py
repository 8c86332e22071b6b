"""Settings from YAML and the command line."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from worldmodel.configuration import apply_overrides, from_mapping, load_config
from worldmodel.errors import InputError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    epochs: int = 3


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    name: str = "a"
    flag: bool = False
    weight: float | None = None
    shares: tuple[float, float] = (0.5, 0.5)
    folder: Path | None = None
    widths: tuple[int, ...] = (8, 8)


def from_yaml(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return load_config(Outer, path)


def test_yaml_fills_nested_settings(tmp_path):
    got = from_yaml(
        tmp_path, "inner: {rate: 1}\nflag: true\nweight: 2\nshares: [1, 0.25]\nfolder: a/b\n"
    )
    assert got == Outer(Inner(rate=1.0), flag=True, weight=2.0, shares=(1.0, 0.25),
                        folder=Path("a/b"))  # fmt: skip
    assert isinstance(got.inner.rate, float) and isinstance(got.shares[0], float)


def test_lists_may_be_of_any_length_where_the_setting_allows(tmp_path):
    assert from_yaml(tmp_path, "widths: [1, 2, 3]\n").widths == (1, 2, 3)
    assert from_yaml(tmp_path, "widths: []\n").widths == ()


def test_empty_yaml_means_the_defaults(tmp_path):
    assert from_yaml(tmp_path, "# nothing\n") == Outer()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope: 1", r"settings\.yaml: unknown setting 'nope'; known: inner, name"),
        ("inner: {nope: 1}", r"settings\.yaml: inner: unknown setting 'nope'; known: rate, epochs"),
        ("inner: {epochs: 1.5}", r"inner: epochs: got 1\.5, expected int"),
        ("inner: {epochs: true}", r"epochs: got True, expected int"),
        ("inner: {rate: fast}", r"rate: got 'fast', expected float"),
        ("inner: 3", r"inner: expected a mapping"),
        ("flag: 1", r"flag: got 1, expected bool"),
        ("weight: x", r"weight: got 'x', expected float or NoneType"),
        ("widths: 3", r"widths: got 3, expected a list"),
        ("widths: [1, x]", r"widths: got 'x', expected int"),
        ("shares: [1]", r"shares: got \[1\], expected a list of 2"),
        ("shares: [1, x]", r"shares: got 'x', expected float"),
        ("- 1", r"expected a mapping of settings, got list"),
        ("0", r"expected a mapping of settings, got int"),
        ("inner: [", r"not readable YAML"),
        ("inner: {rate: .nan}", r"rate: got nan"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        from_yaml(tmp_path, text)


def test_missing_or_binary_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        load_config(Outer, tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xfa\x00")
    with pytest.raises(InputError, match=r"b\.yaml: not readable YAML"):
        load_config(Outer, tmp_path / "b.yaml")


def test_overrides_reach_into_nested_settings():
    got = apply_overrides(
        Outer(name="b"),
        ["inner.rate=2", "inner.epochs=7", "shares=[0.1, 0.9]", "weight=null", "inner.rate=3"],
        source="--set",
    )
    assert got == Outer(Inner(rate=3.0, epochs=7), name="b", shares=(0.1, 0.9))


@dataclass(frozen=True)
class Ordered:
    low: int = 0
    high: int = 1

    def __post_init__(self):
        if self.low >= self.high:
            raise InputError(f"low: got {self.low}, expected less than {self.high}")


def test_settings_that_belong_together_are_checked_together():
    for overrides in (["low=5", "high=9"], ["high=9", "low=5"]):
        assert apply_overrides(Ordered(), overrides, source="--set") == Ordered(5, 9)
    assert apply_overrides(Ordered(5, 9), ["low=3"], source="--set") == Ordered(3, 9)
    with pytest.raises(InputError, match="low: got 5"):
        apply_overrides(Ordered(), ["low=5"], source="--set")


def test_a_section_may_be_changed_at_once_and_keeps_the_rest():
    got = apply_overrides(
        Outer(Inner(rate=2.0)), ["inner={epochs: 5}", "inner.rate=4"], source="--set"
    )
    assert got == Outer(Inner(rate=4.0, epochs=5))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("flag", "--set: 'flag' is not NAME=VALUE"),
        ("nope=1", "--set: unknown setting 'nope'"),
        ("inner.nope=1", "--set: inner: unknown setting 'nope'"),
        ("name.part=1", "--set: unknown setting 'name.part'"),
        ("inner=1", "inner: expected a mapping"),
        ("inner.epochs=x", "inner: epochs: got 'x', expected int"),
        ("=1", "unknown setting ''"),
        ("shares=[1", r"--set: 'shares=\[1' is not readable"),
    ],
)
def test_bad_overrides_are_named(override, message):
    with pytest.raises(InputError, match=message):
        apply_overrides(Outer(), [override], source="--set")


def test_other_mappings_than_dicts_are_refused():
    with pytest.raises(InputError, match="here: expected a mapping"):
        from_mapping(Outer, "name", source="here")


def test_a_key_that_comes_twice_is_named(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("inner: {rate: 0.2, rate: 0.3}\n")
    with pytest.raises(InputError, match="key 'rate' comes twice"):
        load_config(Outer, file)
    with pytest.raises(InputError, match="not readable YAML"):
        apply_overrides(Outer(), ["inner={rate: 0.2, rate: 0.3}"], source="x")
