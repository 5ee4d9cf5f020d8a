"""Rows of a matrix as integers in groups along the axis that a product sums over, and the product of two such matrices.

A product C = P Qᵀ sums over the last axis of both, so that is the axis along which groups run: a tensor that takes part in several products of a
training step is coded anew for each, along its own axis there.  Rows are padded with zeros to whole groups; no group reaches into the next row.

`code_rows(x, spec).values()` equals `qcore.numbers.fake_quantize(x, spec)` bit for bit where the rows need no padding, in a fifth of the time.
An all-zero group takes the lowest scale there is, here without a scale that the tensor shares too.

Left out: formats with uneven numbers (no integers), offsets (a sum over groups would need sums of codes as well).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import Offset, PerChannel, PerGroup, PerToken, QuantSpec, Tile
from qcore.numbers.tensor import ideal_scale, require_finite, store_scale, stored_scale
from qcore.training.levels import levels_of

Rounding = Literal["spec", "stochastic"]


@dataclass(frozen=True)
class CodedRows:
    """A matrix [R, K] as integers under the scales of their groups.

    levels:  [R, G, B] integers, int8 up to 8 bits
    scale:   the stored parts of the groups' scales, by `store_scale`'s names
    columns: K, before padding
    """

    spec: QuantSpec
    levels: Tensor
    scale: Mapping[str, Tensor]
    columns: int

    def steps(self) -> Tensor:
        """What one level of each group is worth.  [R, G] float32"""
        return stored_scale(self.scale, self.spec, tuple(self.levels.shape[:2])) * levels_of(self.spec.format).spacing

    def values(self) -> Tensor:
        """[R, K] float32"""
        return (self.levels * self.steps().unsqueeze(-1)).flatten(1)[:, : self.columns]

    def zero_groups(self) -> int:
        """How many groups hold nothing but zeros."""
        return int((self.levels == 0).all(-1).sum())


def group_of(spec: QuantSpec, columns: int) -> int:
    """Values of one group in rows of so many columns; SpecError where groups are no part of a row, or the spec is not one of integers."""
    if spec.offset is not Offset.NONE or not spec.scaled:
        raise SpecError(f"{spec}: integer products want scales and no offset")
    levels_of(spec.format)
    g = spec.granularity
    if isinstance(g, PerGroup):
        return g.size
    if isinstance(g, Tile) and g.rows == 1:
        return g.cols
    if isinstance(g, PerToken) or (isinstance(g, PerChannel) and g.axis in (0, -2)):
        return columns
    raise SpecError(f"granularity {g.name!r} does not lie inside a row; products sum over rows, so take 'group', 'tile' with rows=1, or 'token'")


def code_rows(x: Tensor, spec: QuantSpec, rounding: Rounding = "spec", generator: torch.Generator | None = None) -> CodedRows:
    """`x` as integers, its groups along the last axis.

    x:        [R, K] float; any strides: give it `t.T` to group along the first axis of t
    rounding: "spec": as the format rounds, to nearest with ties to even, or towards zero.  "stochastic": up with a probability equal to the distance
              from below, so that the mean is exact but for values that clip; wants a generator, and is for gradients alone
    SpecError for NaN and infinity.
    """
    columns = x.shape[-1]
    size = group_of(spec, columns)
    level = levels_of(spec.format)
    blocks = F.pad(x.float(), (0, -columns % size)).unflatten(-1, (-1, size))
    low, high = blocks.aminmax(dim=-1)
    if not bool(torch.isfinite(high - low).all()):
        require_finite(x)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = store_scale(torch.where(high == low, 0.0, ideal_scale(low, high, spec)), spec)
    worth = (stored_scale(scale, spec, tuple(low.shape)) * level.spacing).unsqueeze(-1)
    z = blocks / torch.where(worth == 0, torch.inf, worth)
    if rounding == "stochastic":
        if generator is None:
            raise SpecError("stochastic rounding wants a generator, so that a run can be repeated")
        z.add_(torch.rand(z.shape, generator=generator, device=z.device)).floor_()
    elif level.truncates:
        z.trunc_()
    else:
        z.round_()
    return CodedRows(spec, z.clamp_(level.lowest, level.highest).to(level.dtype), scale, columns)


def accumulator_bits(p: QuantSpec, q: QuantSpec, size: int) -> int:
    """Bits of the magnitude of a sum of `size` products of levels; a signed accumulator has one more.  GSE-INT8 in groups of 32: 19"""
    a, b = levels_of(p.format), levels_of(q.format)
    return ceil(log2(size * max(-a.lowest, a.highest) * max(-b.lowest, b.highest) + 1))


def integer_product(p: CodedRows, q: CodedRows) -> Tensor:
    """p qᵀ as hardware computes it: an int32 accumulator for each pair of groups, then a sum over groups in float64.  [R, K], [S, K] → [R, S] float64

    Exact while what lies between the largest and the smallest bit of a sum fits 53 bits, and then equal to the product of the values in float64.
    SpecError where groups do not meet, or 31 bits may not hold a group's sum.
    """
    if p.columns != q.columns or p.levels.shape[1:] != q.levels.shape[1:]:
        raise SpecError(f"groups {tuple(p.levels.shape[1:])} of {p.columns} columns do not meet {tuple(q.levels.shape[1:])} of {q.columns}")
    if (width := accumulator_bits(p.spec, q.spec, p.levels.shape[-1])) > 31:
        raise SpecError(f"sums of {p.levels.shape[-1]} products of {p.spec.format} and {q.spec.format} have {width} bits, an int32 holds 31")
    sums = torch.einsum("rgi,sgi->rsg", p.levels.int(), q.levels.int())
    return (sums.double() * p.steps().double().unsqueeze(1) * q.steps().double().unsqueeze(0)).sum(-1)
