"""`QuantSpec`: what is stored for one tensor, and nothing about how it was found."""

from collections.abc import Hashable
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from math import prod
from typing import Any, Literal

import torch

from qcore.errors import SpecError
from qcore.numbers.formats import FP4_E2M1, FP8_E4M3, Float, Int, NumberFormat, PowerOfTwo
from qcore.numbers.granularity import GRANULARITIES, Granularity, PerChannel, PerGroup, PerTensor, PerToken, Shape, Unscaled, grid

ScaleDtype = Literal["float32", "float16", "bfloat16"]
SCALE_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Offset(Enum):
    """What stands for zero.  NONE: v = c·s.  CODE: v = (c - zp)·s, with an integer zero point.  VALUE: v = c·s + o, with a stored o."""

    NONE = "none"
    CODE = "code"
    VALUE = "value"


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """What is stored for one tensor.

    format:      the numbers at scale 1
    granularity: which values share a scale
    offset:      what stands for zero
    scale:       how scales are stored: a float dtype, or a spec of their own, recursively (NVFP4: E4M3 under a tensor scale; MX: powers of two)
    when:        "static": scales are stored; "dynamic": they are computed from the tensor at run time (activations)
    """

    format: NumberFormat
    granularity: Granularity
    offset: Offset = Offset.NONE
    scale: "QuantSpec | ScaleDtype" = "float32"
    when: Literal["static", "dynamic"] = "static"

    def __post_init__(self) -> None:
        scaled = not isinstance(self.granularity, Unscaled)
        if self.offset is Offset.CODE and not (isinstance(self.format, Int) and self.format.bits > 1):
            raise SpecError(f"an integer zero point (offset 'code') needs integers of 2 bits or more, got {self.format}; use offset 'value'")
        if self.offset is not Offset.NONE and not scaled:
            raise SpecError(f"granularity 'unscaled' has no offset, got offset {self.offset.value!r}")
        if not isinstance(self.scale, QuantSpec) and (not isinstance(self.scale, str) or self.scale not in SCALE_DTYPES):
            raise SpecError(f"unknown scale dtype {self.scale!r}; have: {', '.join(SCALE_DTYPES)}, or a spec of its own")
        if isinstance(self.scale, QuantSpec) and self.scale.offset is not Offset.NONE:
            raise SpecError("a scale's own spec cannot have an offset")
        if self.when not in ("static", "dynamic"):
            raise SpecError(f"unknown time {self.when!r} at which scales are found; have: static, dynamic")

    @property
    def scaled(self) -> bool:
        return not isinstance(self.granularity, Unscaled)

    def check(self, shape: Shape) -> None:
        """SpecError when a tensor of this shape cannot be stored so."""
        self.granularity.block(shape)
        if shape[-1] % self.format.dim:
            raise SpecError(f"vectors of {self.format.dim} values do not divide K={shape[-1]}")
        if self.format.per_block and self.format.dim > 1 and self.granularity.block(shape)[-1] % self.format.dim:
            raise SpecError(f"vectors of {self.format.dim} values do not divide a block of {self.granularity.block(shape)}")
        if isinstance(self.scale, QuantSpec) and self.scaled:
            self.scale.check(grid(shape, self.granularity.block(shape)))

    def bits_per_value(self, shape: Shape) -> float:
        """Effective bits: the code's share, plus scales and offsets over their blocks.  Fitted parts are counted from packed bytes, not here."""
        bits = self.format.bits / self.format.dim
        if not self.scaled or self.when == "dynamic":
            return bits
        blocks = grid(shape, self.granularity.block(shape))
        per_block = self.scale.bits_per_value(blocks) if isinstance(self.scale, QuantSpec) else SCALE_DTYPES[self.scale].itemsize * 8.0
        if self.offset is Offset.CODE:
            per_block += self.format.bits
        elif self.offset is Offset.VALUE:
            per_block += 32 if isinstance(self.scale, QuantSpec) else SCALE_DTYPES[self.scale].itemsize * 8
        return bits + per_block * prod(blocks) / prod(shape)

    def __str__(self) -> str:
        f, g = self.format, self.granularity
        name = f"{'' if getattr(f, 'signed', True) else 'u'}int{f.bits}" if isinstance(f, Int) else _float_name(f)
        where = "" if isinstance(g, Unscaled) else f" per {g.name}" + (f" {g.size}" if isinstance(g, PerGroup) else "")
        zero = {Offset.NONE: "", Offset.CODE: " +zero-point", Offset.VALUE: " +offset"}[self.offset]
        scale = f", scale {self.scale}" if self.scaled and self.when == "static" and self.scale != "float32" else ""
        return name + where + zero + (" dynamic" if self.when == "dynamic" else "") + scale


def _float_name(f: NumberFormat) -> str:
    if isinstance(f, Float):
        return f"fp{f.bits}-e{f.exponent}m{f.mantissa}"
    return str(f.label or f"{f.name}{f.bits}") + (f"×{f.dim}" if f.dim > 1 else "")


# presets: names for the usual cases, plain functions of their free numbers ---------------------------------------------------------------


def int_weight(bits: int, group: int | None = None, *, asymmetric: bool = False, scale: ScaleDtype = "float16") -> QuantSpec:
    """Integer weights, one scale per `group` inputs, or per output channel without a group."""
    return QuantSpec(
        format=Int(bits),
        granularity=PerGroup(group) if group else PerChannel(0),
        offset=Offset.CODE if asymmetric else Offset.NONE,
        scale=scale,
    )


def int_activation(bits: int = 8) -> QuantSpec:
    """Dynamic symmetric integers, one scale per token."""
    return QuantSpec(format=Int(bits), granularity=PerToken(), when="dynamic")


def fp8_weight(scale: ScaleDtype = "float32") -> QuantSpec:
    """E4M3, one scale per output channel."""
    return QuantSpec(format=FP8_E4M3, granularity=PerChannel(0), scale=scale)


def fp8_activation() -> QuantSpec:
    """Dynamic E4M3, one scale per token."""
    return QuantSpec(format=FP8_E4M3, granularity=PerToken(), when="dynamic")


def mx(element: NumberFormat = FP4_E2M1, *, rule: Literal["floor", "ceil", "even"] = "floor", group: int = 32) -> QuantSpec:
    """OCP MX: `group` elements under one power of two.  MXINT8 is `mx(Int(8))`: its 2^-6 is part of the shared exponent here."""
    return QuantSpec(format=element, granularity=PerGroup(group), scale=QuantSpec(format=PowerOfTwo(rule), granularity=Unscaled()))


def nvfp4() -> QuantSpec:
    """E2M1 in blocks of 16, block scales E4M3 under one float32 tensor scale."""
    return QuantSpec(format=FP4_E2M1, granularity=PerGroup(16), scale=QuantSpec(format=FP8_E4M3, granularity=PerTensor()))


# specs as plain data: what a manifest and a recipe file hold -----------------------------------------------------------------------------


def spec_to_dict(spec: QuantSpec) -> dict[str, Any]:
    """JSON-ready; `spec_from_dict` gives the spec back."""
    return {
        "format": _fields(spec.format),
        "granularity": _fields(spec.granularity),
        "offset": spec.offset.value,
        "scale": spec_to_dict(spec.scale) if isinstance(spec.scale, QuantSpec) else spec.scale,
        "when": spec.when,
    }


def spec_from_dict(d: dict[str, Any], formats: "dict[str, type] | Any") -> QuantSpec:
    """The spec that `spec_to_dict` wrote.  formats: classes by name, such as `load_registry().formats`."""
    unknown = set(d) - {"format", "granularity", "offset", "scale", "when"}
    if unknown:
        raise SpecError(f"unknown field {sorted(unknown)[0]!r} in a quantization spec; have: format, granularity, offset, scale, when")
    if missing := [name for name in ("format", "granularity") if name not in d]:
        raise SpecError(f"a quantization spec has no {missing[0]!r}, got {', '.join(sorted(d)) or 'nothing'}")
    offset, scale = d.get("offset", "none"), d.get("scale", "float32")
    if offset not in (known := [o.value for o in Offset]):
        raise SpecError(f"unknown offset {offset!r}; have: {', '.join(known)}")
    return QuantSpec(
        format=_build(formats, d["format"], "format"),
        granularity=_build(GRANULARITIES, d["granularity"], "granularity"),
        offset=Offset(offset),
        scale=spec_from_dict(scale, formats) if isinstance(scale, dict) else scale,
        when=d.get("when", "static"),
    )


def _fields(value: Any) -> dict[str, Any]:
    return {"name": value.name, **{f.name: getattr(value, f.name) for f in fields(value)}}


def _build(classes: Any, d: dict[str, Any], what: str) -> Any:
    # JSON has no tuples, and no field of a format is a list
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items() if k != "name"}
    if "name" not in d:
        raise SpecError(f"a {what} has no 'name', got {d}")
    try:
        cls = classes[d["name"]]
    except KeyError:
        raise SpecError(f"unknown {what} {d['name']!r}; have: {', '.join(sorted(classes))}") from None
    known = {f.name: f for f in fields(cls) if f.init}
    if bad := sorted(set(kwargs) - set(known)):
        raise SpecError(f"{what} {d['name']!r} has no field {bad[0]!r}; have: {', '.join(sorted(known)) or 'none'}")
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING and name not in kwargs]
    if needed:
        raise SpecError(f"{what} {d['name']!r} needs the field {needed[0]!r}, got {', '.join(sorted(kwargs)) or 'none'}")
    for key, value in kwargs.items():
        wanted = _PLAIN.get(getattr(known[key].type, "__name__", str(known[key].type)), ())
        if (wanted and type(value) not in wanted) or not isinstance(value, Hashable):
            raise SpecError(f"{what} {d['name']!r}: {key} cannot be {value!r} ({type(value).__name__})")
    return cls(**kwargs)


_PLAIN: dict[str, tuple[type, ...]] = {"int": (int,), "bool": (bool,), "float": (int, float), "str": (str,)}
