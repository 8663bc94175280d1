"""The examples in docstrings say what is true."""

import doctest
import importlib
import pkgutil

import pytest

import searchr1_lib

MODULES = [m.name for m in pkgutil.walk_packages(searchr1_lib.__path__, "searchr1_lib.") if "__main__" not in m.name]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as e:  # an engine that `make engines` installs
        pytest.skip(str(e))
    assert doctest.testmod(module).failed == 0
