"""The native kernels, where a compiler is: without one the build goes on, and the package runs on torch's own kernels.

QKERNELS_NATIVE=required makes a failed compilation an error: for those who build wheels.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("src/qkernels/native/csrc")

native = Extension(
    "qkernels.native._native",
    sources=sorted(str(p) for p in SOURCES.glob("*.cpp")),
    depends=sorted(str(p) for pattern in ("*.h", "*.inl") for p in SOURCES.glob(pattern)),
    # the sources choose instructions by themselves, file by file, and the processor at run time: no -march here
    extra_compile_args=[
        *("-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"),
        # GCC's own headers of vector intrinsics: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
    py_limited_api=True,
    optional=os.environ.get("QKERNELS_NATIVE") != "required",
)

# the sources need GCC's or Clang's extensions
modules = [] if sys.platform == "win32" else [native]
setup(ext_modules=modules, options={"bdist_wheel": {"py_limited_api": "cp311"}} if modules else {})
