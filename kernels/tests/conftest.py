"""Triton kernels run under its interpreter where there is no GPU, with three of its defects mended."""

import os

import torch

if not torch.cuda.is_available():
    # read when a kernel is decorated, so before the first import of a `triton.py` of ours
    os.environ["TRITON_INTERPRET"] = "1"


def mend_interpreter() -> None:
    """Triton 3.9: bfloat16 `tl.dot` multiplies bit patterns, and casts to bfloat16 and E4M3 do not round to nearest."""
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    kinds = {tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8)}

    def widened(t):
        if t.dtype.scalar != tl.bfloat16:
            return t
        return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, precision, limit):
        return dot(self, widened(a), widened(b), d, precision, limit)

    def convert_float(data, from_type, to_type, rounding):
        from_scalar, to_scalar = getattr(from_type, "scalar", from_type), getattr(to_type, "scalar", to_type)
        if from_scalar != tl.float32 or to_scalar not in kinds:
            return convert(data, from_type, to_type, rounding)
        target, view, stored = kinds[to_scalar]
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy()).to(target)
        return values.view(view).numpy().view(stored).reshape(data.shape)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float


if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        import triton  # noqa: F401
    except ImportError:
        pass
    else:
        mend_interpreter()
