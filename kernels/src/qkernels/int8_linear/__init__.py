"""int8 × int8 → int32, then scales: the arithmetic of W8A8."""

from qkernels.int8_linear import cpu, reference
from qkernels.int8_linear.reference import int8_linear

__all__ = ["cpu", "int8_linear", "reference"]
