"""`QTensor`, and the three verbs: `quantize` makes codes, `dequantize` makes values, `fake_quantize` makes values on the grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers.formats import NumberFormat
from qcore.numbers.granularity import PerChannel, PerGroup, PerToken, Shape, Tile, block_range, from_blocks, grid, repeat_blocks, spread, to_blocks
from qcore.numbers.spec import SCALE_DTYPES, Offset, QuantSpec


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor: a plain record of its spec and its stored parts.

    parts: "codes"  the tensor's shape; its last axis divided by `format.dim` for vectors
           "scale"  one per block, float32 values that the spec's scale dtype holds exactly; where scales have a spec, "scale.codes", "scale.scale" …
           "offset" one per block: an integer zero point (CODE) or a float (VALUE)
           and the format's own fitted parts, such as "codebook"
    shape: of the tensor that it stands for
    """

    spec: QuantSpec
    parts: Mapping[str, Tensor]
    shape: Shape

    @property
    def codes(self) -> Tensor:
        return self.parts["codes"]

    @property
    def block(self) -> Shape:
        return self.spec.granularity.block(self.shape)

    def scale(self) -> Tensor:
        """One scale per block, as float32.  [g0, g1, …]"""
        if isinstance(self.spec.scale, QuantSpec):
            return self._scale_tensor().dequantize()
        return self.parts["scale"].float()

    def _scale_tensor(self) -> "QTensor":
        assert isinstance(self.spec.scale, QuantSpec)
        own = {k.removeprefix("scale."): v for k, v in self.parts.items() if k.startswith("scale.")}
        return QTensor(self.spec.scale, own, grid(self.shape, self.block))

    def params(self) -> dict[str, Tensor]:
        """The format's fitted parts."""
        return {name: self.parts[name] for name in self.spec.format.parts}

    def dequantize(self) -> Tensor:
        """The values that the codes stand for.  → [*shape] float32"""
        fmt, block = self.spec.format, self.block
        values = _by_block(self) if fmt.per_block else fmt.decode(self.codes, self.params()).reshape(self.shape)
        if not self.spec.scaled:
            return values
        if self.spec.offset is Offset.CODE:
            values = values - spread(self.parts["offset"].float(), block, self.shape)
        values = values * spread(self.scale(), block, self.shape)
        if self.spec.offset is Offset.VALUE:
            values = values + spread(self.parts["offset"].float(), block, self.shape)
        return values

    def misfit(self) -> str | None:
        """What is wrong with the shapes of the parts, or None; works on meta.  Codebooks are their formats' own affair."""
        blocks = grid(self.shape, self.block)
        wanted = {"codes": (*self.shape[:-1], self.shape[-1] // self.spec.format.dim)}
        if self.spec.scaled and not isinstance(self.spec.scale, QuantSpec):
            wanted["scale"] = blocks
        if self.spec.scaled and self.spec.offset is not Offset.NONE:
            wanted["offset"] = blocks
        for name, shape in wanted.items():
            if tuple(self.parts[name].shape) != shape:
                return f"{name} has shape {tuple(self.parts[name].shape)}, {self.spec} of shape {self.shape} has {shape}"
        if self.spec.scaled and isinstance(self.spec.scale, QuantSpec) and (inner := self._scale_tensor().misfit()) is not None:
            return f"the scale's {inner}"
        return None

    def nbytes(self) -> int:
        """Bytes of the parts as they are held here, codes unpacked."""
        return sum(t.numel() * t.element_size() for t in self.parts.values())


def _by_block(q: QTensor) -> Tensor:
    """The values at scale 1 of a format with parts of its own for each block, which are not repeated for every code.  → [*shape]"""
    fmt, block = q.spec.format, q.block
    codes = to_blocks(q.codes, (*block[:-1], block[-1] // fmt.dim))  # [g0, g1, …, n]
    # one axis more, along which all codes of a block meet its parts
    own = {name: p if name in fmt.shared else p.unsqueeze(codes.ndim - 1) for name, p in q.params().items()}
    values = fmt.decode(codes, own)
    return from_blocks(values if fmt.dim == 1 else values.flatten(-2), block, q.shape)


def per_value_params(spec: QuantSpec, params: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Fitted parts laid out for `encode` and `decode` of a whole tensor: shared ones as they are, per-block ones repeated for every code."""
    if not spec.format.per_block:
        return dict(params)
    d = spec.format.dim
    block = spec.granularity.block(shape)
    codes_block, codes_shape = (*block[:-1], block[-1] // d), (*shape[:-1], shape[-1] // d)
    return {name: p if name in spec.format.shared else repeat_blocks(p, codes_block, codes_shape) for name, p in params.items()}


def require_finite(x: Tensor) -> None:
    """SpecError when x holds NaN or infinity: there is no number to store for them."""
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        first = tuple(int(i) for i in (~torch.isfinite(x)).nonzero()[0])
        raise SpecError(f"{bad} of {x.numel()} values are NaN or infinite (first at {first}); mend the source, there is no code for them")


def scale_parts(low: Tensor, high: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """The stored scale and offset that cover [low, high] of each block without clipping.  low, high: [g0, g1, …]; zero lies between them.

    Without an offset the scale is the smallest that lets both ends fit: max(low / lo, high / hi).  On int4, (-3.5, 10.2) gives 10.2 / 7 = 1.457;
    with a zero point (10.2 + 3.5) / 15 = 0.913.  All-zero blocks get scale 1 where the format has a zero, else 0; also 0 with offset VALUE, and
    where scales have a scale of their own.
    """
    ideal = ideal_scale(low, high, spec)
    parts = store_scale(ideal, spec)
    if spec.offset is not Offset.NONE:
        parts["offset"] = offset_part(low, stored_scale(parts, spec, tuple(ideal.shape)), spec)
    return parts


def ideal_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """The scale of each block that covers [low, high], before it is rounded to what is stored; see `scale_parts`.  [g0, g1, …] float32"""
    fmt = spec.format
    low, high = low.float(), high.float()
    if spec.offset is Offset.NONE:
        choose = getattr(spec.scale.format, "choose_scale", None) if isinstance(spec.scale, QuantSpec) else None
        if choose is not None:
            ideal = choose(torch.maximum(-low, high), fmt)
        else:
            ideal = high / fmt.hi
            if fmt.lo < 0:
                ideal = torch.maximum(ideal, low / fmt.lo)
    else:
        # in float64, for high - low may exceed float32
        ideal = ((high.double() - low.double()) / (fmt.hi - fmt.lo)).float()
    empty = (high - low) <= 0
    key: Any = fmt  # frozen dataclasses are hashable, which the protocol cannot say
    # beside a 1, scales of small values would vanish under the scale that they share
    shared = isinstance(spec.scale, QuantSpec) and spec.scale.scaled
    return torch.where(empty, 1.0 if _has_zero(key) and spec.offset is not Offset.VALUE and not shared else 0.0, ideal)


def offset_part(low: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """The stored offset that puts the format's smallest number at `low`, given the stored scale of each block."""
    fmt, low = spec.format, low.float()
    if spec.offset is Offset.CODE:
        zero = (fmt.lo - low / torch.where(scale == 0, 1.0, scale)).round().clamp(fmt.lo, fmt.hi)
        return zero.to(torch.int8 if fmt.lo < 0 else torch.uint8)
    return _stored(low - fmt.lo * scale, spec.scale if isinstance(spec.scale, str) else "float32", "an offset")


@lru_cache
def _has_zero(fmt: NumberFormat) -> bool:
    """Whether zero is one of the format's numbers: not for one signed bit, and nobody knows for fitted ones."""
    if fmt.parts:
        return False
    zero = torch.zeros(1) if fmt.dim == 1 else torch.zeros(1, fmt.dim)
    return not fmt.decode(fmt.encode(zero)).any()


def store_scale(ideal: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """Round ideal scales (float32, one per block) to what the spec stores, before any code is chosen: the solver sees the stored grid."""
    if isinstance(spec.scale, QuantSpec):
        inner = quantize(ideal, spec.scale)
        return {f"scale.{name}": part for name, part in inner.parts.items()}
    return {"scale": _stored(ideal, spec.scale, "a scale")}


def _stored(values: Tensor, dtype_name: str, what: str) -> Tensor:
    """float32 values that the dtype holds exactly: the nearest ones, but no value is rounded to zero.

    Below the normal numbers (6.1e-5 in float16) magnitudes are rounded up: the nearest multiple of 2^-24 could be a third too small, and would clip.
    """
    dtype = SCALE_DTYPES[dtype_name]
    if dtype is torch.float32:
        return values
    limits = torch.finfo(dtype)
    stored = values.to(dtype).float()
    if not torch.isfinite(stored).all():
        worst = float(values[~torch.isfinite(stored)][0])
        raise SpecError(f"{what} of {worst:.4g} does not fit {dtype_name} (largest {limits.max:.4g}); use scale 'bfloat16' or 'float32'")
    step = limits.smallest_normal * limits.eps  # between subnormal numbers
    return torch.where(values.abs() < limits.smallest_normal, torch.copysign((values.abs() / step).ceil() * step, values), stored)


def stored_scale(parts: Mapping[str, Tensor], spec: QuantSpec, blocks: Shape) -> Tensor:
    """The float32 scales that stored parts stand for.  → [g0, g1, …]"""
    if isinstance(spec.scale, QuantSpec):
        own = {k.removeprefix("scale."): v for k, v in parts.items() if k.startswith("scale.")}
        return QTensor(spec.scale, own, blocks).dequantize()
    return parts["scale"].float()


def quantize(x: Tensor, spec: QuantSpec, parts: Mapping[str, Tensor] | None = None, weight: Tensor | None = None) -> QTensor:
    """Round every value of `x` to the nearest number that the spec can store.

    x:      any shape, any float dtype
    parts:  scale, offset and fitted parts to use; those that are missing are computed from `x` without clipping
    weight: importance of each value for fitted formats, of x's shape
    Raises SpecError for NaN or infinity, and where the granularity does not fit the shape.
    """
    shape = tuple(x.shape)
    spec.check(shape)
    x = x.float()
    require_finite(x)
    block = spec.granularity.block(shape)
    chosen = dict(parts or {})
    if spec.scaled and not any(k == "scale" or k.startswith("scale.") for k in chosen):
        chosen |= scale_parts(*block_range(x, block), spec)
    z = normalize(x, spec, chosen)
    fmt = spec.format
    if any(name not in chosen for name in fmt.parts):
        chosen |= fit_parts(z, spec, weight)
    fitted = {name: chosen[name] for name in fmt.parts}
    vectors = z if fmt.dim == 1 else z.unflatten(-1, (-1, fmt.dim))
    codes = fmt.encode(vectors, per_value_params(spec, fitted, shape))
    return QTensor(spec, {"codes": codes, **chosen}, shape)


def normalize(x: Tensor, spec: QuantSpec, parts: Mapping[str, Tensor]) -> Tensor:
    """`x` in units of the format: what `encode` takes.  [*shape] → [*shape] float32"""
    if not spec.scaled:
        return x.float()
    shape = tuple(x.shape)
    block = spec.granularity.block(shape)
    scale = stored_scale(parts, spec, grid(shape, block))
    s = spread(torch.where(scale == 0, 1.0, scale), block, shape)
    if spec.offset is Offset.VALUE:
        x = x - spread(parts["offset"].float(), block, shape)
    z = x.float() / s
    if (scale == 0).any():
        z = torch.where(spread(scale == 0, block, shape), 0.0, z)
    if spec.offset is Offset.CODE:
        # round(x/s) + zp = round(x/s + zp): the zero point is an integer
        z = z + spread(parts["offset"].float(), block, shape)
    return z


def fit_parts(z: Tensor, spec: QuantSpec, weight: Tensor | None = None) -> dict[str, Tensor]:
    """The format's fitted parts for already normalized values `z`, per tensor or per block."""
    fmt = spec.format
    shape = tuple(z.shape)
    block = spec.granularity.block(shape)
    if fmt.per_block and weight is None and any(d % b for d, b in zip(shape, block, strict=True)):
        # blocks at the edges are filled up with zeros, which count for nothing
        weight = torch.ones_like(z)

    def lay(t: Tensor) -> Tensor:
        rows = to_blocks(t, block).flatten(0, -2) if fmt.per_block else t.reshape(1, -1)
        return rows if fmt.dim == 1 else rows.unflatten(-1, (-1, fmt.dim))

    fitted = fmt.fit(lay(z), None if weight is None else lay(weight.expand(shape)))
    if not fmt.per_block:
        return {name: p[0] for name, p in fitted.items()}
    return {name: p if name in fmt.shared else p.unflatten(0, grid(shape, block)) for name, p in fitted.items()}


def fake_quantize(x: Tensor, spec: QuantSpec, parts: Mapping[str, Tensor] | None = None) -> Tensor:
    """`x` on the spec's grid: quantize, then dequantize.  Same shape and dtype."""
    return quantize(x, spec, parts).dequantize().to(x.dtype)


def rows_are_apart(spec: QuantSpec) -> bool:
    """Whether each row of a matrix has scales, offsets and fitted parts of its own, so that rows can be solved together or one by one alike."""
    if not spec.scaled:
        return not spec.format.parts
    g = spec.granularity
    alone = isinstance(g, PerGroup | PerToken) or (isinstance(g, PerChannel) and g.axis in (0, -2)) or (isinstance(g, Tile) and g.rows == 1)
    nested = isinstance(spec.scale, QuantSpec) and (spec.scale.scaled or bool(spec.scale.format.parts))
    return alone and not nested and (not spec.format.parts or (spec.format.per_block and not spec.format.shared))


def split_rows(q: QTensor, sizes: Sequence[int]) -> list[QTensor]:
    """The pieces of a matrix whose rows are apart (`rows_are_apart`): [N1 + N2 + …, K] → [N1, K], [N2, K] …"""
    pieces = {name: part.split(list(sizes)) for name, part in q.parts.items()}
    return [QTensor(q.spec, {name: p[i] for name, p in pieces.items()}, (n, *q.shape[1:])) for i, n in enumerate(sizes)]


def concat_rows(pieces: Sequence[QTensor]) -> QTensor:
    """One tensor from pieces that lie below each other, all of one spec: [N1, K], [N2, K] … → [N1 + N2 + …, K].

    SpecError when scales or fitted parts are shared by rows of different pieces.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    shape = (sum(q.shape[0] for q in pieces), *first.shape[1:])
    spec = first.spec
    if any(q.spec != spec for q in pieces):
        raise SpecError(f"pieces of one weight have different specs: {', '.join(sorted({str(q.spec) for q in pieces}))}; give them one rule")
    shared_parts = bool(spec.format.parts) and (not spec.format.per_block or bool(spec.format.shared))
    nested = isinstance(spec.scale, QuantSpec) and spec.scale.scaled
    if (
        shared_parts
        or nested
        or (spec.scaled and any(q.shape[0] % q.block[0] for q in pieces[:-1]))
        or (spec.scaled and len({q.block[0] for q in pieces}) > 1)
    ):
        raise SpecError(f"{spec} shares numbers between the rows of pieces that are solved apart; use granularity 'channel' or 'group'")
    if spec.scaled and first.block[0] == first.shape[0] > 1:
        raise SpecError(f"{spec} has one scale for all rows, but they are solved in pieces; use granularity 'channel' or 'group'")
    return QTensor(spec, {name: torch.cat([q.parts[name] for q in pieces]) for name in first.parts}, shape)
