"""Products shared among threads, borrowed from OpenMP or our own: forks, several callers, changing numbers, the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.runtime import kernels
from threaded_products import changing_numbers, many_callers

SCRIPT = Path(__file__).parents[1] / "threaded_products.py"
POOLS = ("borrowed", "own")


@pytest.fixture(autouse=True)
def compiled():
    if kernels.library() is None:
        pytest.skip("no kernels here")


def run(pool, *scenarios):
    """In a fresh process, which must come to its end."""
    done = subprocess.run([sys.executable, SCRIPT, pool, *scenarios], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_several_callers_at_once(threads):
    many_callers()


def test_numbers_of_threads_that_change(threads):
    changing_numbers()


def test_the_same_on_threads_of_our_own():
    run("own", "many_callers", "changing_numbers")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("pool", POOLS)
def test_a_forked_child_computes_what_its_parent_does(pool):
    run(pool, "forks", "forks_amid_a_product")


@pytest.mark.parametrize("pool", POOLS)
def test_the_interpreter_ends_while_threads_are_awake(pool):
    run(pool, "exit_at_once")
