"""PyTrees of different classes are different, and a program of one is never run for another."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from policy import registry
from policy.planner import Planner
from worldmodel import struct
from worldmodel.observation import as_pytree


@struct.dataclass
class First:
    x: jax.Array
    name: str = struct.field(pytree_node=False, default="a")

    def __call__(self, y):
        return y + 1


@struct.dataclass
class Second:
    x: jax.Array
    name: str = struct.field(pytree_node=False, default="a")

    def __call__(self, y):
        return y + 2


def test_classes_with_equal_fields_have_different_structures():
    one, other = map(jax.tree.structure, (First(1), Second(1)))
    assert one != other and one == jax.tree.structure(First(2))
    assert one != jax.tree.structure(First(1, name="b"))
    assert jax.tree.structure((First(1), 2)) != jax.tree.structure((Second(1), 2))


def test_built_in_policies_have_different_structures():
    made = [jax.tree.structure(as_pytree(make())) for make in registry.SIMPLE.values()]
    assert all(one != other for i, one in enumerate(made) for other in made[:i])
    nested = [jax.tree.structure(Planner(0, 0, make(), None)) for make in registry.SIMPLE.values()]
    assert all(one != other for i, one in enumerate(nested) for other in nested[:i])


def test_policies_of_users_are_told_apart():
    """Whatever they are written with, their own structures may be equal."""
    structures = []
    for _ in range(2):

        @partial(jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=[])
        @dataclasses.dataclass(frozen=True)
        class Own:
            x: jax.Array

            def __call__(self, key, observation):
                return self.x

        structures += [jax.tree.structure(as_pytree(Own(1))), jax.tree.structure(as_pytree(Own(2)))]
    assert structures[0] == structures[1] and structures[2] == structures[3]
    assert structures[0] != structures[2]


def test_no_program_of_another_class_is_run():
    """With `register_dataclass` about one of six of these calls ran another's program."""
    compiled = jax.jit(lambda policy, y: policy(y))
    for number in range(80):

        @struct.dataclass
        class Adds:
            def __call__(self, y, number=number):
                return y + number

        assert float(compiled(Adds(), jnp.float32(0))) == number


def test_it_is_a_frozen_dataclass_and_a_pytree():
    value = First(jnp.ones(2), name="b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.x = 0
    doubled = jax.tree.map(lambda leaf: 2 * leaf, value)
    assert isinstance(doubled, First) and doubled.name == "b" and doubled.x.sum() == 4
    assert value.replace(name="c").name == dataclasses.replace(value, name="c").name == "c"
    ((path, _),) = jax.tree_util.tree_flatten_with_path(value)[0]
    assert jax.tree_util.keystr(path) == ".x"
