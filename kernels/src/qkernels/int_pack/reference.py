"""Pack b-bit codes along the last axis, least significant bit first: code i holds bits i·b … i·b + b - 1 of its row's stream.

Each row starts on a new word; what is left of its last word is zero.  A code may straddle two words, so no bit is wasted for 3, 5, 6 or 7 bits.
"""

import torch
from torch import Tensor

from qkernels._check import FLOATING, INTEGERS, require, require_choice, require_groups

WORD_BYTES = {torch.uint8: 1, torch.int32: 4}
CHUNK = 1 << 22  # codes whose int64 accumulators are alive at one time


def packed_words(count: int, bits: int, word: torch.dtype = torch.uint8) -> int:
    """How many words a row of `count` codes takes."""
    return -(-count * bits // (8 * WORD_BYTES[word]))


def pack(codes: Tensor, bits: int, word: torch.dtype = torch.uint8) -> Tensor:
    """The stream of each row.

    codes:  [..., K] integers; the low `bits` bits count, so negative codes are stored in two's complement
    word:   torch.uint8, or torch.int32 (little endian)
    return: [..., ceil(K·bits / bits of a word)] of that dtype
    """
    _check_bits(bits)
    require("codes", codes, (..., None), INTEGERS)
    require_choice("word", word, tuple(WORD_BYTES))
    *rows, k = codes.shape
    words = packed_words(k, bits, word)
    if codes.is_meta or codes.numel() == 0:
        return torch.zeros(*rows, words, dtype=word, device=codes.device)
    flat = codes.reshape(-1, k)
    step = max(1, CHUNK // k)
    packed = torch.cat([_pack_rows(chunk, bits) for chunk in flat.split(step)])
    padding = words * WORD_BYTES[word] - packed.shape[-1]
    if padding:
        packed = torch.nn.functional.pad(packed, (0, padding))
    return packed.reshape(*rows, words * WORD_BYTES[word]).contiguous().view(word)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The unsigned codes of each row.

    packed: [..., W] uint8 or int32, as `pack` made it
    count:  codes of a row, K
    return: [..., K] uint8 up to 8 bits, else int32
    """
    _check_bits(bits)
    require("packed", packed, (..., None), tuple(WORD_BYTES))
    words = packed_words(count, bits, packed.dtype)
    if packed.shape[-1] != words:
        raise ValueError(f"{count} codes of {bits} bits take {words} words of {packed.dtype}, got {packed.shape[-1]}")
    dtype = torch.uint8 if bits <= 8 else torch.int32
    rows = packed.shape[:-1]
    if packed.is_meta or packed.numel() == 0:
        return torch.zeros(*rows, count, dtype=dtype, device=packed.device)
    stream = packed.contiguous().view(torch.uint8).reshape(-1, words * WORD_BYTES[packed.dtype])
    step = max(1, CHUNK // count)
    return torch.cat([_unpack_rows(chunk, bits, count) for chunk in stream.split(step)]).to(dtype).reshape(*rows, count)


def sign_extend(codes: Tensor, bits: int) -> Tensor:
    """Unsigned `bits`-bit patterns as two's complement.  [...] → [...] int8 up to 8 bits, else int32"""
    half = 1 << (bits - 1)
    signed = (codes.to(torch.int16 if bits <= 8 else torch.int32) ^ half) - half
    return signed.to(torch.int8) if bits <= 8 else signed


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"codes have 1 to 16 bits, got {bits}")


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """[R, K] → [R, ceil(K·bits / 8)] uint8"""
    r, k = codes.shape
    if bits == 8:
        return codes.to(torch.uint8)
    per_byte = {1: 8, 2: 4, 4: 2}.get(bits)
    if per_byte:
        fields = torch.nn.functional.pad(codes.to(torch.uint8) & ((1 << bits) - 1), (0, -k % per_byte)).reshape(r, -1, per_byte)
        out = fields[..., 0].clone()
        for i in range(1, per_byte):
            out |= fields[..., i] << (i * bits)
        return out
    if bits > 8:
        # one plane a bit, then bits as codes: eight such codes would not fit an int64
        planes = (codes.to(torch.int64).unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
        return _pack_rows(planes.flatten(1), 1)
    fields = torch.nn.functional.pad(codes.to(torch.int64) & ((1 << bits) - 1), (0, -k % 8)).reshape(r, -1, 8)
    # eight codes are exactly `bits` bytes
    acc = fields[..., 0].clone()
    for i in range(1, 8):
        acc |= fields[..., i] << (i * bits)
    octets = torch.stack([(acc >> (8 * i)) & 0xFF for i in range(bits)], -1)
    return octets.to(torch.uint8).flatten(1)[:, : -(-k * bits // 8)]


def _unpack_rows(stream: Tensor, bits: int, count: int) -> Tensor:
    """[R, bytes] uint8 → [R, count]"""
    r = stream.shape[0]
    if bits == 8:
        return stream[:, :count].clone()
    per_byte = {1: 8, 2: 4, 4: 2}.get(bits)
    mask = (1 << bits) - 1
    if per_byte:
        return torch.stack([(stream >> (i * bits)) & mask for i in range(per_byte)], -1).flatten(1)[:, :count]
    octets = -(-count // 8)
    need = octets * bits
    # a code spans at most 7 + bits bits: two bytes up to 8 bits, three above
    wide = torch.int16 if bits <= 8 else torch.int32
    padded = torch.nn.functional.pad(stream, (0, max(0, need - stream.shape[1])))[:, :need].reshape(r, octets, bits).to(wide)
    codes = []
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        value = padded[..., first] >> shift
        for more in range(1, 3):
            if first + more < bits and 8 * more - shift < bits:
                value = value | (padded[..., first + more] << (8 * more - shift))
        value = value & mask
        codes.append(value.to(torch.uint8) if bits <= 8 else value)
    return torch.stack(codes, -1).flatten(1)[:, :count]


def quantize_pack(w: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Round to the nearest code, ties to even, and pack codes + 2^(bits-1).

    w:      [N, K] float
    scale:  [N, K/G] float
    return: [N, ceil(K·bits / 32)] int32
    """
    _check_bits(bits)
    require("w", w, (None, None), FLOATING)
    require("scale", scale, (w.shape[0], None), FLOATING, w)
    require_groups("scale", scale.shape[1], w.shape[1])
    half = 1 << (bits - 1)
    s = scale.float().repeat_interleave(w.shape[1] // scale.shape[1], 1)
    z = torch.where(s == 0, 0.0, w.float() / torch.where(s == 0, 1.0, s))
    return pack(z.clamp(-half, half - 1).round().to(torch.int32) + half, bits, torch.int32)


def dequantize(words: Tensor, scale: Tensor, *, bits: int, count: int) -> Tensor:
    """The values [N, count] float32 that `quantize_pack`'s words stand for."""
    require("words", words, (None, None), tuple(WORD_BYTES))
    require("scale", scale, (words.shape[0], None), FLOATING, words)
    require_groups("scale", scale.shape[1], count)
    codes = unpack(words, bits, count).float() - (1 << (bits - 1))
    return codes * scale.float().repeat_interleave(count // scale.shape[1], 1)
