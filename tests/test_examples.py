"""The examples in docstrings are what Python prints."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import pytest

import t3jax

MODULES = ("guidance", "head", "pooling", "refinements")


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    module = importlib.import_module(f"t3jax.{name}")
    names = {"jax": jax, "jnp": jnp, "t3jax": t3jax}
    tests = doctest.DocTestFinder().find(module, extraglobs=names)
    examples = [test for test in tests if test.examples]
    assert len(examples) >= 2
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in examples:
        assert runner.run(test).failed == 0, test.name
