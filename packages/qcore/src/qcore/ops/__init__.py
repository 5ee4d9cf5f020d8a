"""Binding to qkernels: what a kernel is, how one is chosen, and those that qcore brings."""

from qcore.ops.activation import quantize_input, static_parts
from qcore.ops.conv import ConvJob, OnednnInt8Conv, ReferenceConv
from qcore.ops.kernel import Choice, Job, Kernel, choose
from qcore.ops.linear import ReferenceLinear, TorchInt4Linear, TorchInt8DynamicLinear
from qcore.ops.native import NativeInt8ByWish, NativeInt8Linear, NativeWeightLinear

KERNELS = (
    NativeInt8ByWish,
    NativeInt8Linear,
    NativeWeightLinear,
    TorchInt8DynamicLinear,
    TorchInt4Linear,
    ReferenceLinear,
    OnednnInt8Conv,
    ReferenceConv,
)

__all__ = [
    "KERNELS",
    "Choice",
    "ConvJob",
    "Job",
    "Kernel",
    "NativeInt8ByWish",
    "NativeInt8Linear",
    "NativeWeightLinear",
    "OnednnInt8Conv",
    "ReferenceConv",
    "ReferenceLinear",
    "TorchInt4Linear",
    "TorchInt8DynamicLinear",
    "choose",
    "quantize_input",
    "static_parts",
]
