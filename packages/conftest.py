"""What holds for the tests of all packages."""

import os

import pytest
from hypothesis import settings

# every run draws the same examples; QCORE_FUZZ_EXAMPLES=1000 draws others, as many (tools/bench/fuzz.py)
if "QCORE_FUZZ_EXAMPLES" not in os.environ:
    settings.register_profile("repeatable", derandomize=True, database=None)
    settings.load_profile("repeatable")

# a proof in a process of its own costs a start of Python and torch each time; test_fresh_proof.py and integration_tests/ ask for it
os.environ.setdefault("QCORE_FRESH_PROOF", "0")

# Triton reads its environment when it is imported, which some library may do before the tests of its kernels come
if "TRITON_INTERPRET" not in os.environ:
    from qkernels import interpreter

    interpreter.interpret()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in a process for each processor, four at most, with a thread each (pytest-xdist; `-n 0` for one process).

    A part of it, slow tests (which time things) and --pdb do not: a process takes as long to start as a few files to run.
    """
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and option.markexpr == "not slow" and not option.usepdb
    # a worker's own command line is that of the whole suite too
    if whole and not hasattr(config, "workerinput") and getattr(option, "numprocesses", 0) is None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        option.numprocesses = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        option.dist = "loadfile"
