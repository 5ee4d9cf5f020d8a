"""What holds for the tests of all packages."""

import os

import pytest

# a proof in a process of its own costs a start of Python and torch each time; test_fresh_proof.py and integration_tests/ ask for it
os.environ.setdefault("QCORE_FRESH_PROOF", "0")

# Triton reads its environment when it is imported, which some library may do before the tests of its kernels come
if "TRITON_INTERPRET" not in os.environ:
    from qkernels import interpreter

    interpreter.interpret()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each processor, four at most, each with one thread; none where paths or slow tests (which time things) were asked for."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr == "not slow"
    if not whole:
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
