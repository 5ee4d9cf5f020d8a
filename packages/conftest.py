"""What holds for the tests of all packages."""

import os

# a proof in a process of its own costs a start of Python and torch each time; test_fresh_proof.py and integration_tests/ ask for it
os.environ.setdefault("QCORE_FRESH_PROOF", "0")
