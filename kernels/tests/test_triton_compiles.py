"""Every Triton kernel is compiled for GPUs that are not here: none spills registers, and those that multiply matrices do it on tensor cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

REPORT = Path(__file__).parents[2] / "tools/bench/triton_report.py"


@pytest.mark.timeout(300)
def test_no_kernel_spills_or_misses_the_tensor_cores():
    # a process of its own: kernels decorated for the interpreter cannot be compiled
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, REPORT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(done.stdout.count(target) > 5 for target in ("sm_80", "sm_90", "gfx942")), done.stdout
