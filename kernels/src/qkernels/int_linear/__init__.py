"""y = x Ŵᵀ with inputs rounded to int8 and an integer weight in groups: W4A8, W8A8."""

from qkernels.int_linear import cpu, reference

__all__ = ["cpu", "reference"]
