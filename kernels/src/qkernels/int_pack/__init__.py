"""Integer codes of 1 to 16 bits in a dense bit stream, and back."""

from qkernels.int_pack.reference import dequantize, pack, packed_words, quantize_pack, sign_extend, unpack

__all__ = ["dequantize", "pack", "packed_words", "quantize_pack", "sign_extend", "unpack"]
