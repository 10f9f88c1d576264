"""Imports point one way: pruning <- models <- pipeline <- runtime, shrinking <- evaluation <- reporting <- api, cli."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import secateur

ROOT = Path(secateur.__file__).parent
RANK = dict.fromkeys(["errors", "progress", "_version", "coming_from"], 0)  # anyone may import these
RANK |= {"pruning": 1, "models": 2, "pipeline": 3, "runtime": 4, "shrinking": 4, "evaluation": 5, "training": 5}
RANK |= {"reporting": 6, "api": 7, "cli": 8}
FILES = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.py"))]


def imports(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Yield the absolute name of everything that a module of `package` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            yield from (".".join(filter(None, (*base, node.module, alias.name))) for alias in node.names)


def offences(source: str, file: Path) -> list[str]:
    """Return the imports of `file` (a path below the package) that point upwards or sideways."""
    part = file.parts[0].removesuffix(".py")
    found = []
    for name in imports(source, ("secateur", *file.parts[:-1])):
        top, _, below = name.partition(".")
        target = below.partition(".")[0]
        if top == "secateur":
            allowed = target == part or RANK.get(target, 99) < RANK[part] or RANK.get(target) == 0
            allowed &= part != "pruning" or target in ("pruning", "errors")
        else:
            allowed = part != "pruning" or top == "torch" or top in sys.stdlib_module_names
        found += [] if allowed else [name]
    return found


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_one_way(file: Path) -> None:
    if str(file) not in ("__init__.py", "__main__.py"):
        assert file.parts[0].removesuffix(".py") in RANK, "a new part: give it a rank above"
        assert offences((ROOT / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("pruning/scores.py", "from ..errors import OptionError\nfrom . import patterns\nimport torch.nn, math", []),
        ("pruning/scores.py", "from .. import models", ["secateur.models"]),
        ("pruning/scores.py", "import numpy", ["numpy"]),
        ("pruning/scores.py", "from ..progress import Progress", ["secateur.progress.Progress"]),
        (
            "pruning/__init__.py",
            "from .scores import wanda\nfrom ..models.source import x",
            ["secateur.models.source.x"],
        ),
        ("models/deep/er.py", "from ...pipeline import stream", ["secateur.pipeline.stream"]),
        ("models/deep/er.py", "from ..source import x\nfrom ...pruning import wanda\nimport numpy", []),
        ("pipeline/stream.py", "def f():\n    from secateur.reporting import page", ["secateur.reporting.page"]),
        ("evaluation/speed.py", "import secateur.training.masks", ["secateur.training.masks"]),
        ("errors.py", "from .pruning import wanda", ["secateur.pruning.wanda"]),
        ("progress.py", "from .errors import SecateurError", []),
        ("cli/making.py", "from .. import api, coming_from\nfrom .._version import __version__", []),
        ("api/making.py", "from .. import cli\nimport secateur", ["secateur.cli", "secateur"]),
    ],
)
def test_the_check_sees_what_it_should(file: str, source: str, expected: list[str]) -> None:
    assert offences(source, Path(file)) == expected
