"""Rotate rows by a Hadamard matrix and quantize them to int8, in one pass."""

from qkernels.hadamard_quantize import reference

__all__ = ["reference"]
