"""Binding to qkernels: what a kernel is, how one is chosen, and those that qcore brings."""

from qcore.ops.activation import quantize_input, static_parts
from qcore.ops.conv import ConvJob, OnednnInt8Conv, ReferenceConv
from qcore.ops.int_linear import TorchIntLinear
from qcore.ops.kernel import Choice, Job, Kernel, choose
from qcore.ops.kv_attention import ReferenceKVAttention, TritonKVAttention
from qcore.ops.linear import ReferenceLinear, TorchInt4Linear, TorchInt8DynamicLinear
from qcore.ops.native import NativeInt8ByWish, NativeInt8Linear, NativeWeightLinear

_LINEAR = (NativeInt8ByWish, NativeInt8Linear, NativeWeightLinear, TorchInt8DynamicLinear, TorchIntLinear, TorchInt4Linear, ReferenceLinear)
KERNELS = (*_LINEAR, OnednnInt8Conv, ReferenceConv, TritonKVAttention, ReferenceKVAttention)

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
    "ReferenceKVAttention",
    "ReferenceLinear",
    "TorchInt4Linear",
    "TorchInt8DynamicLinear",
    "TorchIntLinear",
    "TritonKVAttention",
    "choose",
    "quantize_input",
    "static_parts",
]
