"""Compile every Triton kernel without a device and look at what came out: registers, spills, shared memory, matrix instructions.

    python tools/bench/triton_report.py                      a table
    python tools/bench/triton_report.py --json docs/evidence/triton.json
    python tools/bench/triton_report.py --tiles --json docs/evidence/triton-tiles.json

With --tiles every candidate tile (qkernels/_tiles.py) instead of the default ones; what is left is written to kernels/src/qkernels/tiles.json.

Ends with 1 where a kernel spills registers, needs more shared memory than a target has, or multiplies matrices without a tensor-core instruction;
with --tiles, where a kernel has no tile left for a target.  Needs no GPU: ptxas comes with Triton.
About 30 seconds of one core, with --tiles 3 minutes.
"""

import argparse
import hashlib
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
from qkernels._tiles import CANDIDATES, TABLE, Tile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
# KiB that one program may have: 1 of sm_80's 164 and of sm_90's 228 is the system's
SHARED = {"sm_80": 163, "sm_90": 227, "gfx942": 64}
MMA = re.compile(r"\b(mma\.sync\.[\w.]+|wgmma\.mma_async\.[\w.]+|v_mfma_\w+|v_smfmac_\w+)")


def all_cases() -> list[Case]:
    """What each op's `triton.py` wants compiled."""
    folder = Path(qkernels.__file__).parent
    return [case for path in sorted(folder.glob("*/triton.py")) for case in importlib.import_module(f"qkernels.{path.parent.name}.triton").cases()]


def report(case: Case, name: str) -> dict[str, Any]:
    """What came out of one compilation for the target `name`; `fails` says why it cannot be used there, and is empty where it can.

    Triton compiles anew where an integer argument is a multiple of 16.  Every wrapper demands that of K, and only then are loads pipelined, in shared
    memory; of the other sizes nothing is assumed.
    """
    row: dict[str, Any] = {"target": name, "kernel": case.name}
    try:
        row |= compiled(case, TARGETS[name])
    except Exception as error:  # whatever the compiler says: it has no type of its own for a tile that is too large
        return row | {"registers": None, "spills": None, "shared": None, "mma": [], "mma_count": 0, "fails": [f"does not compile: {reason(error)}"]}
    fails = []
    if row["spills"]:
        fails.append(f"spills {row['spills']} bytes of registers")
    if row["shared"] > SHARED[name] * 1024:
        fails.append(f"needs {row['shared']} bytes of shared memory of {SHARED[name] * 1024}")
    if case.mma and not row["mma"]:
        fails.append("no matrix instruction")
    return row | {"fails": fails}


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1][:120]}"


def compiled(case: Case, target: GPUTarget) -> dict[str, Any]:
    signature = dict(case.signature) | dict.fromkeys(case.constants, "constexpr")
    whole = [name for name, kind in case.signature.items() if kind.startswith("*") or (case.mma and name == "K")]
    # argument order is that of the kernel
    order = case.kernel.arg_names
    aligned = {(order.index(name),): [["tt.divisibility", 16]] for name in whole}
    source = ASTSource(fn=case.kernel, signature={name: signature[name] for name in order}, constexprs=dict(case.constants), attrs=aligned)
    done = triton.compile(source, target=target, options={"num_warps": case.warps, "num_stages": case.stages})
    text = done.asm.get("ptx") or done.asm["amdgcn"]
    found = Counter(m.group(1) for m in MMA.finditer(text))
    registers, spills = nvidia_registers(done.asm["cubin"]) if target.backend == "cuda" else amd_registers(text)
    return {
        "registers": registers,
        "spills": spills,
        "shared": done.metadata.shared,
        "mma": [name for name, _ in found.most_common(2)],
        "mma_count": sum(found.values()),
    }


def sources(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that has a kernel with tiles to choose from."""
    ops = sorted({kernel.split()[0] for kernel in CANDIDATES})
    return {f"{op}/triton.py": hashlib.sha256((folder / op / "triton.py").read_bytes()).hexdigest() for op in ops}


def judge(tiles: dict[str, list[Tile]], targets: list[str]) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Compile every variant of every kernel with every tile given: all rows, and kernel → target → what is kept, and what is struck out and why.

    One variant that fails strikes a tile out for the kernel.
    """
    rows: list[dict[str, Any]] = []
    kernels: dict[str, dict[str, Any]] = {}
    for kernel, several in sorted(tiles.items()):
        variants = [case for case in all_cases() if case.tiles == kernel]
        for name in targets:
            judged: dict[str, Any] = {"kept": [], "struck": {}}
            for tile in several:
                tried = [report(case.with_tile(tile), name) | {"tile": str(tile)} for case in variants]
                failed = [f"{row['kernel']}: {', '.join(row['fails'])}" for row in tried if row["fails"]]
                if failed:
                    judged["struck"][str(tile)] = failed
                else:
                    judged["kept"].append(str(tile))
                rows += tried
                for row in tried:
                    show(row)
            kernels.setdefault(kernel, {})[name] = judged
    return rows, kernels


def show(row: dict[str, Any]) -> None:
    what = f"{row['mma_count']} × {row['mma'][0]}" if row["mma"] else "–"
    tile = f"   {row['tile']}" if "tile" in row else ""
    failed = f"   FAILS: {', '.join(row['fails'])}" if row["fails"] else ""
    sizes = [row[name] if row[name] is not None else "–" for name in ("registers", "spills", "shared")]
    print(f"{row['kernel']:<34}{row['target']:<8}{sizes[0]:>5}{sizes[1]:>7}{sizes[2]:>8}  {what}{tile}{failed}", flush=True)


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
    parser.add_argument("--tiles", action="store_true", help="every candidate tile; writes tiles.json unless --only or --target leaves something out")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    options = parser.parse_args(argv)
    targets = options.target or list(TARGETS)
    print(f"{'kernel':<34}{'target':<8}{'regs':>5}{'spills':>7}{'shared':>8}  matrix instructions")
    if options.tiles:
        rows, kernels = judge({kernel: list(tiles) for kernel, tiles in CANDIDATES.items() if options.only in kernel}, targets)
        if not options.only and not options.target:
            table = {"triton": triton.__version__, "sources": sources(TABLE.parent), "kernels": kernels}
            TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        lost = [f"{kernel} on {name}" for kernel, of in kernels.items() for name, judged in of.items() if not judged["kept"]]
        print(*(f"NO TILE LEFT: {name}" for name in lost), sep="\n")
    else:
        rows = []
        for case in all_cases():
            for name in targets if options.only in case.name else ():
                rows.append(report(case, name))
                show(rows[-1])
        lost = [row["kernel"] for row in rows if row["fails"]]
    if options.json:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        options.json.write_text(f'{{\n "triton": "{triton.__version__}",\n "rows": [\n{lines}\n ]\n}}\n')
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
