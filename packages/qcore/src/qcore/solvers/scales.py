"""Scales, offsets and fitted parts: how they are searched, and the stored grid of one weight laid out for work on columns.

Solvers work on the transposed weight [K, N]: the N weights that meet one input lie side by side, and so do their scales.  One step for all rows is
then a few passes over contiguous memory, whatever the format; no scale is ever spread to the size of the weight.

A candidate scale is rounded to what the spec stores *before* its error is measured.  Where scales have scales (NVFP4's tensor scale, double
quantization), the upper ones are fixed first, from the ranges without clipping.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import Int, Offset, QTensor, QuantSpec
from qcore.numbers.granularity import Shape, grid, spread, to_blocks
from qcore.numbers.spec import SCALE_DTYPES
from qcore.numbers.tensor import ideal_scale, offset_part, quantize, store_scale, stored_scale

_CHUNK = 1 << 17  # values per pass of a search: half a megabyte of float32 stays in a core's cache


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """How each block's scale is chosen.  The common options of the solvers.

    clip:         "none": the smallest scale that clips nothing.  "mse": the one of least rounding error among `steps` shrunk ranges, polished by
                  least squares; values beyond are clipped
    norm:         exponent of the error that is summed; 2 is the mean square, GPTQ's own scripts use 2.4
    shrink:       the smallest range tried, as a fraction of the full one
    steps:        ranges tried, evenly spaced from 1 down to `shrink`
    signed_scale: try negative scales too.  Two's complement reaches one step further below zero than above (int4: -8 … 7); a negative scale gives
                  that step to the end which needs it, and costs nothing at run time.  GGUF's Q4_0 does the same.
    """

    clip: Literal["none", "mse"] = "mse"
    norm: float = 2.0
    shrink: float = 0.4
    steps: int = 12
    signed_scale: bool = True

    def __post_init__(self) -> None:
        if self.clip not in ("none", "mse"):
            raise SpecError(f"unknown clip rule {self.clip!r}; have: none, mse")
        if not self.norm > 0:
            raise SpecError(f"the error's exponent is positive, got norm={self.norm}")
        if not 0 < self.shrink <= 1 or self.steps < 1:
            raise SpecError(f"a clip search tries ranges from 1 down to shrink in (0, 1], at least one; got shrink={self.shrink}, steps={self.steps}")

    def factors(self, spec: QuantSpec) -> list[float]:
        """The fractions of the full range to try; the full range itself first, so that ties clip nothing."""
        if self.clip == "none":
            return [1.0]
        if isinstance(spec.scale, QuantSpec) and hasattr(spec.scale.format, "choose_scale"):
            return [1.0, 0.5, 2.0]  # neighbours of a power of two
        step = (1 - self.shrink) / max(self.steps - 1, 1)
        shrunk = [1 - i * step for i in range(self.steps)]
        # numbers that are not evenly spaced may fit better under a larger scale: E2M1 with its gap between 4 and 6, codebooks
        return shrunk if isinstance(spec.format, Int) else [*shrunk, *(1 + (i + 1) * step for i in range(int(0.5 / step) if step else 0))]

    def signs(self, spec: QuantSpec) -> tuple[int, ...]:
        fmt = spec.format
        lopsided = isinstance(fmt, Int) and fmt.signed and fmt.bits > 1 and spec.offset is Offset.NONE
        stores_sign = spec.scale.format.lo < 0 if isinstance(spec.scale, QuantSpec) else True
        return (1, -1) if self.signed_scale and self.clip == "mse" and lopsided and stores_sign else (1,)


class Lattice:
    """The numbers that one weight [N, K] can be stored as: scales, offsets and fitted parts, found group of columns by group of columns.

    A group is a column of blocks: `bc` columns, with R blocks of `br` rows each; G groups in all.

    scale:  [G, R] float32, as stored
    offset: [G, R] float32, or None
    params: the format's fitted parts; shared, or [R, G, *] per block
    """

    def __init__(self, spec: QuantSpec, shape: Shape) -> None:
        spec.check(shape)
        self.spec, self.shape = spec, shape
        self.br, self.bc = spec.granularity.block(shape)
        self.R, self.G = grid(shape, (self.br, self.bc))
        self.scale = torch.ones(self.G, self.R)
        self.offset = None if spec.offset is Offset.NONE else torch.zeros(self.G, self.R)
        self.params: dict[str, Tensor] = {}
        self._upper: dict[str, Tensor] = {}  # a nested scale's own scales
        self._unit: Tensor | None = None  # [G, R], what a nested scale's codes are multiplied with
        fmt = spec.format
        self._plain_int = isinstance(fmt, Int) and not (fmt.signed and fmt.bits == 1)
        self._shared_fit = bool(fmt.parts) and not fmt.per_block

    # fitting -----------------------------------------------------------------------------------------------------------------------------

    def start(self, wt: Tensor, weight: Tensor | None = None) -> None:
        """Fix what all groups share, from the original weights: upper scales, and codebooks of the whole tensor.

        wt: [K, N]; weight: importance, broadcastable to wt
        """
        spec, fmt = self.spec, self.spec.format
        if isinstance(spec.scale, QuantSpec) and spec.scaled:
            ideal = torch.stack([ideal_scale(*self._range(x), spec) for x in self._groups(wt)])  # [G, R]
            parts = store_scale(ideal.T.contiguous(), spec)
            self._upper = {k.removeprefix("scale."): v for k, v in parts.items() if k != "scale.codes"}
            if spec.scale.scaled:
                blocks = (self.R, self.G)
                self._unit = spread(stored_scale(self._upper, spec.scale, grid(blocks, spec.scale.granularity.block(blocks))),
                                    spec.scale.granularity.block(blocks), blocks).expand(blocks).T.contiguous()  # fmt: skip
        if self._shared_fit:
            z = torch.cat([self._normal(x, *self._cover(g, *self._range(x), 1)) for g, x in enumerate(self._groups(wt))]).T
            points = z.reshape(1, -1) if fmt.dim == 1 else z.reshape(1, -1, fmt.dim)
            heavy = None if weight is None else weight.expand_as(wt).T.reshape(points.shape)
            self.params = {name: p[0] for name, p in fmt.fit(points, heavy).items()}

    def choose(self, g: int, x: Tensor, search: ScaleSearch, weight: Tensor | None = None) -> None:
        """Choose the scale, offset and own fitted parts of group g for the values x.

        x: [m, N]; weight: importance of each value's error, [m, 1] or [m, N]
        """
        spec, fmt = self.spec, self.spec.format
        x = x.float()
        weight = None if weight is None else weight.float()
        low, high = self._range(x)
        if spec.scaled:
            if isinstance(fmt, Int) and fmt.signed and fmt.bits == 1 and spec.offset is Offset.NONE and search.clip == "mse":
                scale, offset = self._round(g, self._mean_magnitude(x, weight)), None
            elif fmt.per_block:
                scale, offset = self._cover(g, low, high, 1)
            else:
                scale, offset = self._search(g, x, low, high, search, weight)
            self.scale[g] = scale
            if self.offset is not None and offset is not None:
                self.offset[g] = offset
        if fmt.per_block:
            z = self._normal(x, self.scale[g], None if self.offset is None else self.offset[g])
            points, heavy = self._block_points(z), None if weight is None else self._block_points(weight.expand_as(z))
            for name, p in fmt.fit(points, heavy).items():
                if name not in self.params:
                    self.params[name] = p.new_zeros(self.R, self.G, *p.shape[1:])
                self.params[name][:, g] = p

    def _search(self, g: int, x: Tensor, low: Tensor, high: Tensor, search: ScaleSearch, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        best_scale, best_offset = self._cover(g, low, high, 1)
        signs, factors = search.signs(self.spec), search.factors(self.spec)
        if len(signs) * len(factors) == 1:
            return best_scale, best_offset
        best = self.error(g, x, best_scale, best_offset, search.norm, weight)
        tried = [(sign, f) for sign in signs for f in factors if (sign, f) != (1, 1.0)]
        for sign, f in tried:
            scale, offset = self._cover(g, low * f, high * f, sign)
            best, best_scale, best_offset = self._better(g, x, scale, offset, search.norm, weight, best, best_scale, best_offset)
        if self.offset is None:
            scale = self._least_squares(g, x, best_scale, weight)
            best, best_scale, best_offset = self._better(g, x, scale, None, search.norm, weight, best, best_scale, best_offset)
        return best_scale, best_offset

    def _better(
        self, g: int, x: Tensor, scale: Tensor, offset: Tensor | None, norm: float, weight: Tensor | None,
        best: Tensor, best_scale: Tensor, best_offset: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        error = self.error(g, x, scale, offset, norm, weight)
        better = error < best
        if offset is not None:
            assert best_offset is not None
            best_offset = torch.where(better, offset, best_offset)
        return torch.where(better, error, best), torch.where(better, scale, best_scale), best_offset

    def error(self, g: int, x: Tensor, scale: Tensor, offset: Tensor | None, norm: float = 2.0, weight: Tensor | None = None) -> Tensor:
        """Σ weight·|x - nearest|^norm over each block of group g, under a scale and offset.  [m, N] → [R]"""
        m, n = x.shape
        total = torch.empty(n)
        step = max(_CHUNK // m, 1)
        for a in range(0, n, step):
            b = min(a + step, n)
            e = self._nearest(g, x[:, a:b], scale, offset, a).sub_(x[:, a:b])
            e = e.square_() if norm == 2 else e.abs_().pow_(norm)
            if weight is None:
                total[a:b] = e.sum(0)
            elif weight.shape[1] == 1:
                total[a:b] = (weight.T @ e)[0]
            else:
                total[a:b] = e.mul_(weight[:, a:b]).sum(0)
        return self.over_blocks(total)

    def _least_squares(self, g: int, x: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
        """The best scale for the codes that `scale` gives: Σ w·x·q / Σ w·q².  → [R], as stored"""
        m, n = x.shape
        xq, qq = torch.empty(n), torch.empty(n)
        step = max(_CHUNK // m, 1)
        for a in range(0, n, step):
            b = min(a + step, n)
            s = self._rows(scale, a, b)
            q = self._nearest(g, x[:, a:b], scale, None, a) / torch.where(s == 0, 1.0, s)
            wq = q if weight is None else q * (weight if weight.shape[1] == 1 else weight[:, a:b])
            xq[a:b], qq[a:b] = (wq * x[:, a:b]).sum(0), (wq * q).sum(0)
        xq, qq = self.over_blocks(xq), self.over_blocks(qq)
        return self._round(g, torch.where(qq > 0, xq / torch.where(qq > 0, qq, 1.0), scale))

    def _mean_magnitude(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """The best scale for the codes -1 and +1.  [m, N] → [R]"""
        heavy = torch.ones_like(x) if weight is None else weight.expand_as(x)
        mass = self.over_blocks(heavy.sum(0))
        return self.over_blocks((x.abs() * heavy).sum(0)) / torch.where(mass > 0, mass, 1.0)

    def _cover(self, g: int, low: Tensor, high: Tensor, sign: int) -> tuple[Tensor, Tensor | None]:
        """The stored scale and offset that cover [low, high] without clipping; sign -1: the numbers mirrored.  [R] each"""
        if not self.spec.scaled:
            return torch.ones(self.R), None
        if sign < 0:
            return self._round(g, -ideal_scale(-high, -low, self.spec)), None
        scale = self._round(g, ideal_scale(low, high, self.spec))
        return scale, None if self.offset is None else offset_part(low, scale, self.spec).float()

    def _round(self, g: int, ideal: Tensor) -> Tensor:
        """Scales of group g as they are stored.  [R] → [R]"""
        scale = self.spec.scale
        if not isinstance(scale, QuantSpec):
            return store_scale(ideal, self.spec)["scale"]
        own = {name: self._upper[name] for name in scale.format.parts}
        if self._unit is None:
            return scale.format.decode(scale.format.encode(ideal, own), own)
        unit = self._unit[g]
        z = torch.where(unit == 0, 0.0, ideal / torch.where(unit == 0, 1.0, unit))
        return scale.format.decode(scale.format.encode(z, own), own) * unit

    def refit_scale(self, g: int, ideal: Tensor) -> Tensor:
        """What the spec stores for these scales of group g; the largest that it can, where they are too large.  [R] → [R]"""
        if isinstance(self.spec.scale, QuantSpec):
            return self._round(g, ideal)
        top = torch.finfo(SCALE_DTYPES[self.spec.scale]).max
        return self._round(g, ideal.clamp(-top, top))

    def refit_offset(self, g: int, ideal: Tensor) -> Tensor:
        """What the spec stores for these float offsets.  [R] → [R]"""
        return ideal.to(SCALE_DTYPES[self.spec.scale]).float() if isinstance(self.spec.scale, str) else ideal

    # using -------------------------------------------------------------------------------------------------------------------------------

    def quantize(self, x: Tensor, g: int) -> tuple[Tensor, Tensor]:
        """Codes and float values of the nearest stored numbers in group g.  [N] or [m, N] → two of that shape; scalar formats only"""
        codes = self._encode(x, g)
        return codes, self.values(codes, g).to(x.dtype)

    def _encode(self, x: Tensor, g: int) -> Tensor:
        fmt = self.spec.format
        z = self._normal(x, self.scale[g], None if self.offset is None else self.offset[g])
        if self._plain_int:
            return z.round_().clamp_(fmt.lo, fmt.hi)  # kept as floats until they are stored
        return fmt.encode(z, self.group_params(g))

    def units(self, codes: Tensor, g: int) -> Tensor:
        """What the codes of group g stand for before the scale: decoded, the zero point taken off.  [m / d, N] → [m, N]; scalar formats also [N]"""
        fmt = self.spec.format
        q = codes if self._plain_int else fmt.decode(codes, self.group_params(g))
        if fmt.dim > 1:
            q = q.movedim(-1, 1).flatten(0, 1)  # [m / d, N, d] → [m, N]
        if self.spec.offset is Offset.CODE:
            q = q - self.rows(self._offset(g))
        return q

    def values(self, codes: Tensor, g: int) -> Tensor:
        """What the codes of group g stand for; shapes as `units`."""
        q = self.units(codes, g)
        if not self.spec.scaled:
            return q
        v = q * self.rows(self.scale[g])
        return v + self.rows(self._offset(g)) if self.spec.offset is Offset.VALUE else v

    def table(self, g: int) -> Tensor:
        """Every vector of a vector format, in code order: [k, d], or [N, k, d] with a codebook for each block."""
        fmt = self.spec.format
        codes = torch.arange(1 << fmt.bits)
        if not fmt.per_block:
            return fmt.decode(codes, self.params)
        params = {name: p.unsqueeze(1) for name, p in self.group_params(g).items()}  # [N, 1, k, d]
        return fmt.decode(codes.expand(self.shape[0], -1), params)

    def code_dtype(self) -> torch.dtype:
        """Of the format's codes; ask when it is fitted."""
        fmt = self.spec.format
        params = {name: p[0, :1] for name, p in self.params.items()} if fmt.per_block else self.params
        return fmt.encode(torch.zeros(1) if fmt.dim == 1 else torch.zeros(1, fmt.dim), params).dtype

    def normal(self, x: Tensor, g: int) -> Tensor:
        """x in units of the format.  [..., N] → [..., N]"""
        return self._normal(x, self.scale[g], None if self.offset is None else self.offset[g])

    def rows(self, t: Tensor) -> Tensor:
        """One value per block, repeated over its rows.  [R] → [N]"""
        return self._rows(t, 0, self.shape[0])

    def over_blocks(self, t: Tensor) -> Tensor:
        """Sums over the rows of each block.  [N] → [R]"""
        if self.br == 1:
            return t
        return torch.nn.functional.pad(t, (0, self.R * self.br - len(t))).view(self.R, self.br).sum(1)

    def group_params(self, g: int) -> dict[str, Tensor]:
        """Fitted parts as `encode` and `decode` of a row of N values take them."""
        if not self.spec.format.per_block:
            return self.params
        return {name: p[:, g].repeat_interleave(self.br, 0)[: self.shape[0]] for name, p in self.params.items()}

    def qtensor(self, codes: Tensor) -> QTensor:
        """The record.  codes: [N, K], or [N, K / dim]"""
        return QTensor(self.spec, {"codes": codes, **self.parts()}, self.shape)

    def parts(self) -> dict[str, Tensor]:
        """Scales, offsets and fitted parts as the spec stores them."""
        spec, parts = self.spec, dict[str, Tensor]()
        if spec.scaled:
            scale = self.scale.T.contiguous()
            if isinstance(spec.scale, QuantSpec):
                parts |= {f"scale.{name}": p for name, p in quantize(scale, spec.scale, self._upper).parts.items()}
            else:
                parts["scale"] = scale
        if self.offset is not None:
            offset = self.offset.T.contiguous()
            parts["offset"] = offset if spec.offset is Offset.VALUE else offset.to(torch.int8 if spec.format.lo < 0 else torch.uint8)
        return parts | self.params

    # inside ------------------------------------------------------------------------------------------------------------------------------

    def _groups(self, wt: Tensor) -> list[Tensor]:
        return [wt[a : a + self.bc].float() for a in range(0, self.shape[1], self.bc)]

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each block, zero always included.  [m, N] → two of [R]"""
        low, high = x.aminmax(dim=0)
        if self.br > 1:
            pad = (0, self.R * self.br - len(low))
            low = torch.nn.functional.pad(low, pad).view(self.R, self.br).amin(1)
            high = torch.nn.functional.pad(high, pad).view(self.R, self.br).amax(1)
        return low.clamp(max=0), high.clamp(min=0)

    def _rows(self, t: Tensor, a: int, b: int) -> Tensor:
        if self.br == 1:
            return t[a:b]
        if self.R == 1:
            return t.expand(b - a)
        return t[torch.arange(a, b) // self.br]

    def _offset(self, g: int) -> Tensor:
        assert self.offset is not None
        return self.offset[g]

    def _normal(self, x: Tensor, scale: Tensor, offset: Tensor | None, a: int = 0) -> Tensor:
        """x in units of the format, as `numbers.tensor.normalize` computes it.  [..., n] for the rows from a on"""
        if not self.spec.scaled:
            return x.clone()
        b = a + x.shape[-1]
        s = self._rows(scale, a, b)
        if offset is not None and self.spec.offset is Offset.VALUE:
            x = x - self._rows(offset, a, b)
        z = x / s
        if not scale.all():
            z = torch.where(s == 0, 0.0, z)
        return z.add_(self._rows(offset, a, b)) if offset is not None and self.spec.offset is Offset.CODE else z

    def _nearest(self, g: int, x: Tensor, scale: Tensor, offset: Tensor | None, a: int) -> Tensor:
        """The nearest values under a candidate scale, in a tensor of their own.  [m, n] for the rows from a on"""
        fmt = self.spec.format
        b = a + x.shape[-1]
        z = self._normal(x, scale, offset, a)
        if self._plain_int:
            q = z.round_().clamp_(fmt.lo, fmt.hi)
        elif fmt.dim == 1:
            params = {name: p[a:b] for name, p in self.group_params(g).items()} if fmt.per_block else self.params
            q = fmt.decode(fmt.encode(z, params), params)
        else:
            vectors = z.unflatten(0, (-1, fmt.dim)).movedim(1, -1)  # [m/d, n, d]
            q = fmt.decode(fmt.encode(vectors, self.params), self.params).movedim(-1, 1).flatten(0, 1)
        if not self.spec.scaled:
            return q
        if offset is not None and self.spec.offset is Offset.CODE:
            q = q - self._rows(offset, a, b)
        q = q.mul_(self._rows(scale, a, b)) if self._plain_int else q * self._rows(scale, a, b)
        return q + self._rows(offset, a, b) if offset is not None and self.spec.offset is Offset.VALUE else q

    def _block_points(self, z: Tensor) -> Tensor:
        """[m, N] → [R, n] values of each block, or [R, n/d, d] vectors."""
        rows = to_blocks(z.T, (self.br, z.shape[0])).flatten(0, -2)
        return rows if self.spec.format.dim == 1 else rows.unflatten(-1, (-1, self.spec.format.dim))


def choose_all(wt: Tensor, lattice: Lattice, search: ScaleSearch, weight: Tensor | None = None) -> None:
    """Choose every group's scale from the original weights.  wt: [K, N]; weight: broadcastable to it"""
    lattice.start(wt, weight)
    for g in range(lattice.G):
        cols = slice(g * lattice.bc, (g + 1) * lattice.bc)
        own = None if weight is None else weight[cols] if weight.shape[0] > 1 else weight.expand(wt[cols].shape[0], -1)
        lattice.choose(g, wt[cols], search, own)


def per_row(values: Tensor, n: int) -> Tensor:
    """One value per input, [K] or [P, K], as a weight for columns: [K, 1], or [K, N] where the rows of each part have their own."""
    if values.ndim == 1:
        return values.unsqueeze(1)
    return values.T.repeat_interleave(n // values.shape[0], 1)
