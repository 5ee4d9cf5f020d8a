"""y = x Ŵᵀ with a weight in FP4 (E2M1) blocks: MXFP4 and NVFP4."""

from qkernels.fp4_linear import reference

__all__ = ["reference"]
