"""Binding to qkernels: what a kernel is, how one is chosen, and those that qcore brings."""

from qcore.ops.activation import quantize_input, static_parts
from qcore.ops.int_linear import TorchIntLinear
from qcore.ops.kernel import Choice, Job, Kernel, choose
from qcore.ops.linear import ReferenceLinear, TorchInt4Linear, TorchInt8DynamicLinear
from qcore.ops.native import NativeInt8ByWish, NativeInt8Linear, NativeWeightLinear

KERNELS = (NativeInt8ByWish, NativeInt8Linear, NativeWeightLinear, TorchInt8DynamicLinear, TorchIntLinear, TorchInt4Linear, ReferenceLinear)

__all__ = [
    "KERNELS",
    "Choice",
    "Job",
    "Kernel",
    "NativeInt8ByWish",
    "NativeInt8Linear",
    "NativeWeightLinear",
    "ReferenceLinear",
    "TorchInt4Linear",
    "TorchInt8DynamicLinear",
    "TorchIntLinear",
    "choose",
    "quantize_input",
    "static_parts",
]
