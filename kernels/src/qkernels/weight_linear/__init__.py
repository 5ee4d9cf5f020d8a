"""y = x Ŵᵀ with float inputs and an integer weight in groups."""

from qkernels.weight_linear import cpu, reference

__all__ = ["cpu", "reference"]
