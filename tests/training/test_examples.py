"""The examples in the docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import secateur.training

NAMES = [f"secateur.training.{module.name}" for module in pkgutil.iter_modules(secateur.training.__path__)]


@pytest.mark.parametrize("name", [*NAMES, "secateur.reporting.trained"])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in NAMES) > 5
