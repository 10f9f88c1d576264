"""Without a compiler at install there are no kernels: that is said once, and everything runs on torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from packings import FORMATS, assert_product, normal, packed, sparse
from secateur.runtime import kernels
from secateur.runtime.linear import PackedLinear

ROOT = Path(__file__).parents[2]


def forget():
    kernels.library.cache_clear()
    kernels.native_bfloat16.cache_clear()


@pytest.fixture
def without(monkeypatch):
    """``without(file)``: no library but that file, which is none."""

    def look_for(file):
        monkeypatch.setattr(kernels, "FILE", file)
        forget()

    yield look_for
    monkeypatch.undo()
    forget()


def layer(format, values):
    found = packed(sparse((9, 70), (2, 4)), format, values, (2, 4))
    made = PackedLinear(found.packing, normal(9))
    for suffix, part in found.parts.items():
        setattr(made, f"weight{suffix}", part)
    return made, found


@pytest.mark.parametrize("content", [None, b"no library"])
def test_it_is_said_once_and_torch_computes(content, without, messages, tmp_path):
    if content is not None:
        (tmp_path / "_kernels.so").write_bytes(content)
    without(tmp_path / "_kernels.so")
    for format in FORMATS[1:]:
        for values in ("float32", "int8"):
            made, found = layer(format, values)
            for batch in (1, 20):
                x = normal(batch, 70)
                assert_product(made(x), found, x, made.bias)
            assert made.kernel() is None
    assert kernels.library() is None and kernels.use() is None and not kernels.native_bfloat16()
    assert len(messages) == 1 and "torch computes instead" in messages[0]
    assert ("want of a C compiler" in messages[0]) == (content is None)


def test_the_layer_takes_kernels_where_there_are_some():
    if kernels.library() is None:
        pytest.skip("no kernels here")
    made, found = layer("nm", "int8")
    assert made.kernel() is not None
    for batch in (1, 8, 9):
        x = normal(batch, 70)
        assert_product(made(x), found, x, made.bias)


AFTERWARDS = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from secateur.runtime import kernels
print(kernels.__file__)
assert kernels.library() is None and kernels.library() is None
"""


def test_a_build_without_a_compiler_goes_through(tmp_path):
    pytest.importorskip("setuptools")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {**os.environ, "CC": "/nonexistent", "PYTHONPATH": str(tmp_path / "src")}
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
    script = [sys.executable, "-c", AFTERWARDS]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    where, *said = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert len(said) == 1 and "want of a C compiler" in said[0]
