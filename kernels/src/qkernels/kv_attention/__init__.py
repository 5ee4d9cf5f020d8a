"""Attention of new tokens over a quantized key and value cache."""

from qkernels.kv_attention import reference

__all__ = ["reference"]
