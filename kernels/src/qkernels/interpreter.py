"""Triton's interpreter, for tests where there is no GPU, with three of its defects mended."""

import os
from importlib.util import find_spec
from typing import Any

import torch


def interpret() -> bool:
    """Make kernels run under the interpreter, from now on in this process, unless a GPU is here; True where they do.

    To be called before the first import of a `triton.py` of ours: Triton reads its environment where a kernel is decorated.
    """
    if torch.cuda.is_available() or find_spec("triton") is None:
        return False
    os.environ["TRITON_INTERPRET"] = "1"
    mend()
    return True


def mend() -> None:
    """Replace what is wrong in Triton 3.9: it multiplies the bit patterns of bfloat16, and truncates to bfloat16 and E4M3."""
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    if getattr(interpreter, "mended_by_qkernels", False):
        return
    interpreter.mended_by_qkernels = True
    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    kinds = {tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8)}

    def widened(t: Any) -> Any:
        if t.dtype.scalar != tl.bfloat16:
            return t
        return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, limit: Any) -> Any:
        return dot(self, widened(a), widened(b), d, precision, limit)

    def convert_float(data: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
        from_scalar, to_scalar = getattr(from_type, "scalar", from_type), getattr(to_type, "scalar", to_type)
        if from_scalar != tl.float32 or to_scalar not in kinds:
            return convert(data, from_type, to_type, rounding)
        target, view, stored = kinds[to_scalar]
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy()).to(target)
        return values.view(view).numpy().view(stored).reshape(data.shape)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float
