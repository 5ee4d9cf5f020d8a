"""uint8 × int8 → int32 convolutions with a zero point, then scales: the arithmetic of static W8A8 on images."""

from qkernels.int8_conv import cpu, reference
from qkernels.int8_conv.reference import int8_conv

__all__ = ["cpu", "int8_conv", "reference"]
