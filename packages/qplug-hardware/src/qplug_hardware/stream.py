"""`block-stream`: blocks of numbers under shared exponents with no wasted bit: exactly m + 2 + 5/32 bits a value of BBFP.

| stored part | what | how |
|---|---|---|
| codes | one per value, row by row | format.bits each, least significant bit first, one stream for the whole tensor; uint8 |
| exponents | one per block, row by row | the exponent format's bits each, likewise |

`bits` starts each row on a byte: three exponents of five bits take two bytes there, and 1 7/8 here.  The price: single rows cannot be cut out, so an
embedding unpacks its whole table.  How an accelerator interleaves codes and exponents no source says, and nothing here guesses it.
"""

from collections.abc import Mapping
from math import prod
from typing import ClassVar

import torch
from qcore.errors import SpecError
from qcore.numbers import PowerOfTwo, QTensor, QuantSpec
from qcore.numbers.granularity import Shape, grid
from qcore.packing import Packing, code_dtype
from qkernels.int_pack import pack, packed_words, unpack
from torch import Tensor

from qplug_hardware.block_float import BBFP, BFP, SharedExponent

ROW = 1 << 16  # codes that are packed as a row: whole bytes for every width, so rows behind each other are one stream; memory stays bounded


def to_stream(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape, the last axis fastest, as ceil(count · bits / 8) bytes."""
    flat = codes.reshape(-1)
    whole = 0 if codes.is_meta else len(flat) // ROW * ROW
    return torch.cat([pack(flat[:whole].reshape(-1, ROW), bits).reshape(-1), pack(flat[whole:], bits)]) if whole else pack(flat, bits)


def from_stream(stream: Tensor, bits: int, shape: Shape) -> Tensor:
    """The unsigned codes that `to_stream` took; ValueError where the stream is of another length."""
    count = prod(shape)
    whole = 0 if stream.is_meta or stream.shape[0] != packed_words(count, bits) else count // ROW
    cut = whole * ROW * bits // 8
    rest = unpack(stream[cut:], bits, count - whole * ROW)
    return (torch.cat([unpack(stream[:cut].reshape(whole, -1), bits, ROW).reshape(-1), rest]) if whole else rest).reshape(shape)


class BlockStream(Packing):
    """Codes and shared exponents of BFP and BBFP as two streams of bits."""

    name: ClassVar[str] = "block-stream"
    rank: ClassVar[int] = 300

    def refuses(self, spec: QuantSpec, shape: Shape) -> str | None:
        if not isinstance(spec.format, BFP | BBFP):
            return f"holds bfp and bbfp, got {spec.format}"
        if spec.when == "dynamic":
            return "dynamic exponents are computed at run time; there is nothing to store"
        if not isinstance(spec.scale, QuantSpec) or not isinstance(spec.scale.format, SharedExponent | PowerOfTwo) or spec.scale.scaled:
            return f"needs shared exponents (format shared-exponent or e8m0, granularity 'unscaled') as scales, got {spec.scale}"
        if not spec.scaled:
            return "needs a granularity with blocks, got 'unscaled'"
        try:
            spec.check(shape)
        except SpecError as e:
            return str(e)
        return None

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        assert isinstance(q.spec.scale, QuantSpec), q.spec
        codes, exponents = q.codes, q.parts["scale.codes"]
        for what, part, bits in (("codes", codes, q.spec.format.bits), ("exponents", exponents, q.spec.scale.format.bits)):
            if not part.is_meta and part.numel() and (int(part.min()) < 0 or int(part.max()) >= 1 << bits):
                raise SpecError(f"{what} run from {int(part.min())} to {int(part.max())}, which {bits} bits cannot hold")
        return {"codes": to_stream(codes, q.spec.format.bits), "exponents": to_stream(exponents, q.spec.scale.format.bits)}

    def unpack(self, parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QTensor:
        assert isinstance(spec.scale, QuantSpec), spec
        blocks = grid(shape, spec.granularity.block(shape))
        try:
            codes = from_stream(parts["codes"], spec.format.bits, shape)
            exponents = from_stream(parts["exponents"], spec.scale.format.bits, blocks)
        except ValueError as e:
            raise SpecError(f"the stored stream does not fit {spec} of shape {shape}: {e}") from e
        return QTensor(spec, {"codes": codes.to(code_dtype(spec.format)), "scale.codes": exponents.to(code_dtype(spec.scale.format))}, shape)
