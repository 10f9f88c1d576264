"""Kernels read and write nothing but what is theirs: beside pages that cannot be read, and compiled with sanitizers.

By hand, for as many matrices as there is time for: ``kernels_driver products FIRST COUNT`` (kernels_driver.c).
"""

import ast
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.runtime import kernels

FOLDER = Path(kernels.__file__).parent
ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")


def wider():
    """The flags of each file, from setup.py."""
    assigned = (node for node in ast.parse((ROOT / "setup.py").read_text()).body if isinstance(node, ast.Assign))
    flags = next(ast.literal_eval(node.value) for node in assigned if node.targets[0].id == "WIDER")
    return flags if platform.machine() in ("x86_64", "AMD64") else {}


def compiled(folder, sanitizers):
    """The driver, or a skip where nothing can be compiled so."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    flags = ["-std=gnu11", "-g1", "-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    (folder / "nothing.c").write_text("int main(void) { return 0; }")
    trial = [COMPILER, *flags, str(folder / "nothing.c"), "-o", str(folder / "nothing")]
    if subprocess.run(trial, capture_output=True).returncode or subprocess.run([folder / "nothing"]).returncode:
        pytest.skip(f"the compiler has no -fsanitize={sanitizers}, or it does not run here")
    objects = []
    for source in [*sorted(FOLDER.glob("*.c")), Path(__file__).with_name("kernels_driver.c")]:
        objects.append(folder / f"{source.stem}.o")
        own = ["-O1"] if source.stem == "kernels_driver" else ["-O0", *wider().get(source.name, [])]
        command = [COMPILER, *flags, *own, "-w", "-I", FOLDER, "-c", source, "-o", objects[-1]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    subprocess.run([COMPILER, *flags, *objects, "-lm", "-o", folder / "driver"], check=True)
    return folder / "driver"


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.endswith("ok\n")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """With address and undefined behaviour sanitizers."""
    return compiled(tmp_path_factory.mktemp("driver"), "address,undefined")


@pytest.fixture(scope="module")
def racing_driver(tmp_path_factory):
    """With the sanitizer of threads."""
    return compiled(tmp_path_factory.mktemp("driver"), "thread")


def test_random_matrices_under_sanitizers(driver):
    run(driver, "products", 1, 400)


def test_large_matrices_under_sanitizers(driver):
    run(driver, "threads", 1)


def test_threads_race_for_nothing(racing_driver):
    run(racing_driver, "threads", 1)


def test_every_chunk_is_worked_on_once(racing_driver):
    run(racing_driver, "pool", 300)


def test_kernels_may_be_chosen_while_others_compute(racing_driver):
    run(racing_driver, "choose", 24)


guarded = pytest.mark.skipif(os.name != "posix", reason="pages are protected with mprotect")
SCRIPT = Path(__file__).parents[1] / "guarded_products.py"


@guarded
def test_nothing_is_read_beyond_a_matrix_or_its_inputs():
    if kernels.library() is None:
        pytest.skip("no kernels here")
    run(sys.executable, SCRIPT)


@guarded
def test_reading_beyond_would_have_been_noticed():
    assert subprocess.run([sys.executable, SCRIPT, "beyond"], capture_output=True, timeout=120).returncode < 0
