"""How a quantized tensor lies in memory and on disk: dict → dict with local names."""

from qcore.packing.base import Packing, first_that_accepts
from qcore.packing.compressed_tensors import CompressedFloat, CompressedInt, CompressedPack
from qcore.packing.dense import Bits, code_dtype

__all__ = ["Bits", "CompressedFloat", "CompressedInt", "CompressedPack", "Packing", "code_dtype", "first_that_accepts"]
