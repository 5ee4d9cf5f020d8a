"""Integer codes of 1 to 16 bits in a dense bit stream, and back."""

from qkernels.int_pack.reference import pack, packed_words, sign_extend, unpack

__all__ = ["pack", "packed_words", "sign_extend", "unpack"]
