"""What can be imported from where, and what importing costs."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import secateur


def exported(module: str) -> list[str]:
    return list(importlib.import_module(module).__all__)


def like_ruff(name: str) -> tuple[int, str]:
    """The order that ruff keeps __all__ in (RUF022): CONSTANTS, Classes, functions."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("module", ["secateur", "secateur.pruning"])
def test_every_exported_name_is_there_once_and_in_order(module: str) -> None:
    names = exported(module)
    assert names == sorted(set(names), key=like_ruff)
    missing = [name for name in names if not hasattr(importlib.import_module(module), name)]
    assert missing == []


@pytest.mark.parametrize("module", ["secateur", "secateur.pruning"])
def test_every_exported_function_class_and_module_is_documented(module: str) -> None:
    bare = []
    for name in exported(module):
        thing = getattr(importlib.import_module(module), name)
        if inspect.isroutine(thing) or inspect.isclass(thing) or inspect.ismodule(thing):
            text = (
                vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
            ) or ""  # not an inherited one
            generated = text.startswith(f"{name}(")  # what dataclass and NamedTuple write by themselves
            bare += [name] if generated or not text.strip() else []
    assert bare == []


@pytest.mark.parametrize("attribute", ["no_such_name", "prunes"])
def test_an_unknown_name_is_an_attribute_error_that_names_it(attribute: str) -> None:
    with pytest.raises(AttributeError, match=attribute):
        getattr(importlib.import_module("secateur"), attribute)


def test_importing_secateur_loads_no_heavy_library() -> None:
    code = "import sys, secateur; print(*sorted({'numpy', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_part_of_the_package_takes_the_name_of_a_function() -> None:
    """Importing a submodule binds its name in the package, in place of what is exported under it."""
    parts = {path.stem for path in Path(secateur.__file__).parent.iterdir()}
    assert parts & set(secateur.__all__) == {"pruning"}  # which is exported itself
