"""The tags of `jax.random.fold_in`: all in one module, and none collides with another."""

import ast
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from worldmodel import keys

ROOT = Path(__file__).parents[2]
PATIENT = ("TRAITS", "POLICY", "SPLIT", "EFFECT_SAMPLES", "BEHAVIOR")
LARGEST_PLAIN = 1000  # larger literal numbers are tags


def test_tags_are_distinct():
    assert len({int(tag) for tag in keys.STEP_TAGS.values()}) == len(keys.STEP_TAGS)
    assert len({int(tag) for tag in (keys.NOISE, keys.POLICY_CHOICE, keys.OUTCOME)}) == 3
    assert keys.AGENT_FORECASTS != keys.LLM_FORECASTS


@pytest.mark.parametrize("name", keys.STEP_TAGS)
def test_tags_lie_outside_the_range_of_steps_and_samples(name):
    assert keys.STEP_TAGS[name].dtype == np.uint32
    assert int(keys.STEP_TAGS[name]) >= keys.MAX_STEPS


@pytest.mark.parametrize("names", list(combinations(keys.STEP_TAGS, 2)), ids="-".join)
def test_a_tag_plus_any_step_is_never_another_tag_plus_a_step(names):
    first, second = (int(keys.STEP_TAGS[name]) for name in names)
    assert abs(first - second) >= keys.MAX_STEPS


@pytest.mark.parametrize("name", ["UNROLL", "COUNTERFACTUAL", "START"])
def test_tags_of_an_episode_key_are_no_stay_id(name):
    assert int(keys.STEP_TAGS[name]) > np.iinfo(np.int32).max


def _private_constants(tree):
    """Values, as syntax trees, of the module's names that begin with an underscore."""
    found = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else ()
        for target in targets:
            if isinstance(target, ast.Name) and target.id.startswith("_"):
                found[target.id] = node.value
    return found


def _is_tag(node, constants):
    """Whether an expression contains a literal above 1000, a shift, or a constant like that."""
    parts = list(ast.walk(node))
    for part in parts:
        if isinstance(part, ast.Constant) and type(part.value) is int:
            if part.value > LARGEST_PLAIN:
                return True
        elif isinstance(part, ast.BinOp) and isinstance(part.op, ast.LShift):
            return True
        elif isinstance(part, ast.Name) and part.id in constants:
            parts.extend(ast.walk(constants[part.id]))
    return False


def bare_tags(source):
    """Lines that fold a number into a key which belongs in `worldmodel.keys`."""
    tree = ast.parse(source)
    constants = _private_constants(tree)
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) == "fold_in"
        and len(node.args) > 1
        and _is_tag(node.args[1], constants)
    ]


@pytest.mark.parametrize(
    "source",
    [
        "fold_in(key, 1 << 20)",
        "jax.random.fold_in(key, 4096)",
        "_TAG = np.uint32(0xCF000000)\njax.random.fold_in(key, _TAG + step)",
    ],
)
def test_the_search_finds_bare_tags(source):
    assert bare_tags(source)


@pytest.mark.parametrize("source", ["fold_in(key, step + 1)", "fold_in(key, keys.SPLIT)"])
def test_the_search_leaves_counted_numbers_alone(source):
    assert not bare_tags(source)


@pytest.mark.parametrize("package", ["worldmodel", "policy", "sepsis_jax"])
def test_no_module_defines_a_tag_of_its_own(package):
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / package).rglob("*.py"))
        if (lines := bare_tags(path.read_text()))
    }
    assert not found
