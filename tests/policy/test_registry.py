"""Policies by name: the simple ones, the clinician, and folders."""

import pytest

from policy import registry
from policy.checkpoint import save_policy
from policy.simple import Constant, GuidelineRules, NoTreatment
from worldmodel.errors import InputError


def test_every_simple_name_makes_a_policy():
    assert registry.names() == (
        "clinician",
        "random",
        "none",
        "max",
        "guideline",
        "titration",
    )
    for name in registry.SIMPLE:
        assert registry.find(name) == (name, registry.make(name))
    assert registry.find("clinician") == ("clinician", None)


def test_a_folder_is_named_after_itself_or_as_asked(tmp_path):
    folder = save_policy(Constant(action=7), tmp_path / "seven")
    assert registry.find(str(folder)) == ("seven", Constant(action=7))
    found = registry.find_all(["none", "clinician", f"other={folder}", str(folder)])
    assert list(found) == ["none", "clinician", "other", "seven"]
    assert registry.open_policy(folder) == found["other"]


def test_the_clinician_is_the_clone_that_is_given():
    assert registry.open_policy("clinician", clinician=NoTreatment) == NoTreatment()
    assert registry.open_policy("guideline") == GuidelineRules()
    with pytest.raises(InputError, match="has to be cloned from records"):
        registry.open_policy("clinician")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: registry.make("best"), "policy 'best' is not built in; known: clinician, random"),
        (
            lambda: registry.find("best", source="--policy"),
            "--policy 'best': neither clinician, random, none, max, guideline, titration nor a",
        ),
        (lambda: registry.find_all([]), "policy: none given; use a folder, clinician, random"),
        (lambda: registry.find_all(["none", "none"]), "policy 'none': none is already there"),
    ],
)
def test_unknown_and_repeated_names_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
