"""Compiles the kernels, if there is a compiler; everything else is in pyproject.toml."""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("src/secateur/runtime/kernels")
FLAGS = ["-O3", "-std=gnu11", "-fvisibility=hidden", "-g0", "-fno-math-errno", "-pthread"]
WIDER = {  # each file is called only on processors that have what it was compiled for
    "avx2.c": ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"],
    "avx512.c": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi2", "-mfma", "-mf16c", "-mpopcnt"],
}


class BuildKernels(build_ext):
    """Builds a plain shared library, which knows nothing of Python and is loaded by ctypes."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        objects = []
        for source in ext.sources:
            wider = WIDER.get(Path(source).name, []) if platform.machine() in ("x86_64", "AMD64") else []
            objects += self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=[*FLAGS, *wider], depends=ext.depends
            )
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, libraries=["m"], extra_postargs=["-pthread"])


class WheelOfAnyPython(bdist_wheel):
    """Names a wheel after the platform alone: one serves every Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": WheelOfAnyPython},
    ext_modules=[
        Extension(
            "secateur.runtime.kernels._kernels",
            sources=sorted(str(path) for path in FOLDER.glob("*.c")),
            depends=sorted(str(path) for path in FOLDER.glob("*.h")),
            optional=True,  # without a compiler the install goes through, and packed layers run on torch
        )
    ],
)
