"""`partly-binary`: a bit for every value that says whether it is salient, a bit for those that are not, a byte for those that are.

| stored part | what | how |
|---|---|---|
| mask | [N, ⌈K / 8⌉] uint8 | 1 = salient, least significant bit first along the row |
| signs | [⌈values that are not salient / 8⌉] uint8 | their codes 0 and 1, row after row |
| salient | [salient values] uint8 | their codes 2 … 255, row after row |
| mean, spread, step | [N, tiles of a row] float16 | as they are |
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from qkernels.int_pack import pack, unpack
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import QTensor, QuantSpec
from qcore.numbers.granularity import Shape
from qcore.numbers.partly_binary import PartlyBinary
from qcore.packing.base import Packing


class PartlyBinaryBits(Packing):
    """Holds matrices of the format `partly-binary`, whichever and however many of their values are salient."""

    name: ClassVar[str] = "partly-binary"
    rank: ClassVar[int] = 400

    def refuses(self, spec: QuantSpec, shape: Shape) -> str | None:
        if not isinstance(spec.format, PartlyBinary):
            return f"holds the format 'partly-binary' alone, got {spec}"
        if spec.scaled or len(shape) != 2:
            return f"holds matrices without scales (granularity 'unscaled-tile'), got {spec} of shape {shape}"
        try:
            spec.check(shape)
        except SpecError as e:
            return str(e)
        return None

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        fmt, codes = q.spec.format, q.codes
        assert isinstance(fmt, PartlyBinary), fmt
        mask = codes >= 2
        if codes.is_meta:
            values = codes.numel()
            apart, rest = codes.new_empty(fmt.count(values)), codes.new_empty(values - fmt.count(values))
        else:
            apart, rest = codes[mask], codes[~mask]
        return {"mask": pack(mask.to(torch.uint8), 1), "signs": pack(rest.unsqueeze(0), 1).squeeze(0), "salient": apart.contiguous()} | {
            name: q.parts[name].contiguous() for name in fmt.parts
        }

    def unpack(self, parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape) -> QTensor:
        fmt = spec.format
        apart, values = parts["salient"], shape[0] * shape[1]
        try:
            mask = unpack(parts["mask"], 1, shape[1]).bool()
            signs = unpack(parts["signs"].unsqueeze(0), 1, values - apart.numel()).squeeze(0)
        except (ValueError, RuntimeError) as e:
            raise SpecError(f"the stored codes do not fit their spec: {e}") from e
        codes = torch.empty(shape, dtype=torch.uint8, device=mask.device)
        if not codes.is_meta:
            if mask.shape != codes.shape or int(mask.sum()) != apart.numel():
                raise SpecError(f"the mask names {int(mask.sum())} salient values, and {apart.numel()} are stored; the checkpoint is damaged")
            codes[mask], codes[~mask] = apart, signs
        return QTensor(spec, {"codes": codes, **{name: parts[name] for name in fmt.parts}}, shape)
