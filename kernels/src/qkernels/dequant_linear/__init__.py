"""y = x Ŵᵀ from unpacked codes, scales and offsets."""

from qkernels.dequant_linear.reference import dequant_linear, dequantize_blocks

__all__ = ["dequant_linear", "dequantize_blocks"]
