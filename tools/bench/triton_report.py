"""Compile every Triton kernel without a device and look at what came out: registers, spills, shared memory, matrix instructions.

    python tools/bench/triton_report.py                      a table
    python tools/bench/triton_report.py --json docs/evidence/triton.json

Ends with 1 where a kernel spills registers, or one that multiplies matrices has no tensor-core instruction.  Needs no GPU: ptxas comes with Triton.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# kernels decorated for the interpreter cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="triton-report-"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import qkernels
import triton
from qkernels._gpu import Case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
MMA = re.compile(r"\b(mma\.sync\.[\w.]+|wgmma\.mma_async\.[\w.]+|v_mfma_\w+|v_smfmac_\w+)")


def all_cases() -> list[Case]:
    """What each op's `triton.py` wants compiled."""
    folder = Path(qkernels.__file__).parent
    return [case for path in sorted(folder.glob("*/triton.py")) for case in importlib.import_module(f"qkernels.{path.parent.name}.triton").cases()]


def compiled(case: Case, target: GPUTarget) -> dict[str, Any]:
    signature = dict(case.signature) | dict.fromkeys(case.constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(case.signature.values()) if kind.startswith("*")}
    # argument order is that of the kernel
    order = case.kernel.arg_names
    source = ASTSource(fn=case.kernel, signature={name: signature[name] for name in order}, constexprs=dict(case.constants), attrs=aligned)
    done = triton.compile(source, target=target, options={"num_warps": case.warps, "num_stages": case.stages})
    text = done.asm.get("ptx") or done.asm["amdgcn"]
    found = Counter(m.group(1) for m in MMA.finditer(text))
    registers, spills = nvidia_registers(done.asm["cubin"]) if target.backend == "cuda" else amd_registers(text)
    return {
        "kernel": case.name,
        "registers": registers,
        "spills": spills,
        "shared": done.metadata.shared,
        "mma": [name for name, _ in found.most_common(2)],
        "mma_count": sum(found.values()),
        "fails": [*(["spills registers"] if spills else []), *(["no matrix instruction"] if case.mma and not found else [])],
    }


def nvidia_registers(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory: what did not fit into them), as they stand in the machine code."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.cubin").write_bytes(cubin)
        done = subprocess.run([cuobjdump, "-res-usage", "k.cubin"], cwd=folder, capture_output=True, text=True)
    found = {name: int(v) for name, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    assert done.returncode == 0 and "REG" in found, done.stdout + done.stderr
    return found["REG"], found["STACK"] + found["LOCAL"]


def amd_registers(text: str) -> tuple[int, int]:
    """(vector registers of a thread, bytes of private memory: what did not fit).

    Scalar registers that are kept in lanes of a vector one are not counted: they cost no memory.
    """
    values = {name: int(v) for name, v in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
    return values["vgpr_count"], values["private_segment_fixed_size"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    options = parser.parse_args(argv)
    rows = []
    print(f"{'kernel':<34}{'target':<8}{'regs':>5}{'spills':>7}{'shared':>8}  matrix instructions")
    for case in all_cases():
        if options.only not in case.name:
            continue
        for name in options.target or TARGETS:
            row = {"target": name, **compiled(case, TARGETS[name])}
            rows.append(row)
            what = f"{row['mma_count']} × {row['mma'][0]}" if row["mma"] else "–"
            failed = f"   FAILS: {', '.join(row['fails'])}" if row["fails"] else ""
            print(f"{row['kernel']:<34}{name:<8}{row['registers']:>5}{row['spills']:>7}{row['shared']:>8}  {what}{failed}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    return 1 if any(row["fails"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
