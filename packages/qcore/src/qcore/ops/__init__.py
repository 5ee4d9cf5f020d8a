"""Binding to qkernels: what a kernel is, how one is chosen, and those that qcore brings."""

from qcore.ops.activation import quantize_input, static_parts
from qcore.ops.kernel import Choice, Job, Kernel, choose
from qcore.ops.linear import KERNELS, ReferenceLinear, TorchInt4Linear, TorchInt8DynamicLinear

__all__ = [
    "KERNELS",
    "Choice",
    "Job",
    "Kernel",
    "ReferenceLinear",
    "TorchInt4Linear",
    "TorchInt8DynamicLinear",
    "choose",
    "quantize_input",
    "static_parts",
]
