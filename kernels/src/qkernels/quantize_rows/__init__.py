"""Rows to int8 codes and one scale each."""

from qkernels.quantize_rows import cpu, reference

__all__ = ["cpu", "reference"]
