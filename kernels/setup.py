"""The native kernels, where a compiler is: without one the build goes on, and the package runs on torch's own kernels."""

import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("src/qkernels/native/csrc")

native = Extension(
    "qkernels.native._native",
    sources=sorted(str(p) for p in SOURCES.glob("*.cpp")),
    depends=sorted(str(p) for pattern in ("*.h", "*.inl") for p in SOURCES.glob(pattern)),
    # the sources choose instructions by themselves, function by function, and the processor at run time: no -march here
    extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-maybe-uninitialized"],
    py_limited_api=True,
    optional=True,
)

# the sources need GCC's or Clang's extensions
setup(ext_modules=[] if sys.platform == "win32" else [native], options={"bdist_wheel": {"py_limited_api": "cp311"}} if sys.platform != "win32" else {})
