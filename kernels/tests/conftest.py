"""Triton kernels run under its interpreter where there is no GPU."""

from qkernels import interpreter

interpreter.interpret()
