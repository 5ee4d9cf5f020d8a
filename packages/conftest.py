"""What holds for the tests of all packages."""

import os

# a proof in a process of its own costs a start of Python and torch each time; test_fresh_proof.py and integration_tests/ ask for it
os.environ.setdefault("QCORE_FRESH_PROOF", "0")

# Triton reads its environment when it is imported, which some library may do before the tests of its kernels come
if "TRITON_INTERPRET" not in os.environ:
    from qkernels import interpreter

    interpreter.interpret()
