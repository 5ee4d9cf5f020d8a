"""The kernels in C++, where they were built: which instruction sets run here, and the two calls behind the ops' `cpu.py`.

Threads come from the OpenMP pool that torch itself uses, as many as `torch.get_num_threads()`; a second pool would fight with it for the cores.
`QKERNELS_ISA=avx2` (or another name of `instruction_sets`) takes another one than the best.
"""

import importlib
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from qkernels._check import require_one

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLOATS = "float32, float16, bfloat16"
NOT_FINITE = 1


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """(the extension, why there is none)"""
    try:
        module = importlib.import_module("qkernels.native._native")
    except ImportError as e:
        return None, f"qkernels was installed without its native kernels ({e}); install it where a C++ compiler (GCC or Clang) is found"
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    module.use_openmp_of(str(torch_cpu))
    return module, None


def extension() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def why_not() -> str | None:
    """Why no native kernel runs here; None where they do."""
    return _load()[1]


def shares_threads() -> bool:
    """Whether torch's OpenMP pool was found; without it the kernels run on one thread."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return why_not() is None and extension().use_openmp_of(str(torch_cpu))


@cache
def instruction_sets() -> tuple[str, ...]:
    """What runs on this processor, best first."""
    if why_not():
        return ()
    return tuple(name for name, _, offered in extension().available() if offered)


@cache
def isa_index(name: str | None = None) -> int:
    """The extension's number of an instruction set; of the best one, or of QKERNELS_ISA, without a name."""
    found = {entry: index for entry, index, _ in extension().available()}
    wanted = name or os.environ.get("QKERNELS_ISA") or instruction_sets()[0]
    if wanted not in found:
        raise ValueError(f"isa: {wanted!r} does not run on this processor; allowed: {', '.join(found)}")
    return found[wanted]


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    shape: tuple[int, int],
    group: int,
    bits: int,
    *,
    int8_inputs: bool,
    x_scale: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    """y = x Ŵᵀ from panels (`qkernels.panels`); x is quantized to int8 first where asked.

    x:       [..., K] float32, float16 or bfloat16 on CPU
    x_scale: one float32, of static int8 inputs; None = one scale a row, from the row
    return:  [..., N], x.dtype
    """
    n, k = shape
    dtype = TYPES.get(x.dtype)
    if dtype is None or not x.is_cpu or x.shape[-1] != k:
        raise ValueError(f"x: has shape {list(x.shape)}, {x.dtype}, on {x.device}; allowed: [..., {k}] of {FLOATS} on cpu")
    if not codes.is_cpu:
        raise ValueError(f"codes: is on {codes.device}; allowed: cpu, where x is")
    if x_scale is not None:
        require_one("x_scale", x_scale, (torch.float32,), x)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    rows = x.numel() // k
    if rows == 0:
        return y
    status = extension().linear(
        isa_index(isa),
        int8_inputs,
        x.data_ptr(),
        dtype,
        rows,
        codes.data_ptr(),
        scale.data_ptr(),
        TYPES[scale.dtype],
        0 if shift is None else shift.data_ptr(),
        n,
        k,
        group,
        bits,
        y.data_ptr(),
        dtype,
        torch.get_num_threads(),
        0 if x_scale is None else x_scale.data_ptr(),
    )
    if status == NOT_FINITE:
        raise ValueError("x: holds NaN or infinity, for which there is no int8 code; allowed: finite values")
    return y


def quantize_rows(x: Tensor, x_scale: Tensor | None = None, *, isa: str | None = None) -> tuple[Tensor, Tensor]:
    """(codes [T, K] int8, scale [T, 1] float32) of x [T, K]; see `qkernels.quantize_rows`."""
    dtype = TYPES.get(x.dtype)
    if dtype is None or not x.is_cpu or x.dim() != 2:
        raise ValueError(f"x: has shape {list(x.shape)}, {x.dtype}, on {x.device}; allowed: [T, K] of {FLOATS} on cpu")
    if x_scale is not None:
        require_one("x_scale", x_scale, (torch.float32,), x)
    x = x.contiguous()
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], 1)
    if x.numel() == 0:
        return codes, scale.fill_(1)
    static = 0 if x_scale is None else x_scale.data_ptr()
    status = extension().quantize(isa_index(isa), x.data_ptr(), dtype, *x.shape, static, codes.data_ptr(), scale.data_ptr(), torch.get_num_threads())
    if status == NOT_FINITE:
        raise ValueError("x: holds NaN or infinity, for which there is no int8 code; allowed: finite values")
    return codes, scale


# An operator that torch.compile keeps in its graph.  torch.library.custom_op would do the same, but its wrappers (a search for aliased arguments,
# autograd) cost 10 µs a call, more than a layer of 576 × 576 takes.  Gradients of x never come here: `qcore.ops.native` takes the reference for them.
_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define(
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor? shift, int n, int k, int group, int bits, bool int8_inputs, Tensor? x_scale) -> Tensor"
)


def _compiled(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    n: int,
    k: int,
    group: int,
    bits: int,
    int8_inputs: bool,
    x_scale: Tensor | None,
) -> Tensor:
    return linear(x, codes, scale, shift, (n, k), group, bits, int8_inputs=int8_inputs, x_scale=x_scale)


def _shape_alone(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    n: int,
    k: int,
    group: int,
    bits: int,
    int8_inputs: bool,
    x_scale: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


_LIBRARY.impl("linear", _compiled, "CPU")
torch.library.register_fake("qkernels::linear", _shape_alone, lib=_LIBRARY)
compiled_linear = torch.ops.qkernels.linear.default
