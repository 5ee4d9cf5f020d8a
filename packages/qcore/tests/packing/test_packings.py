from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers import (
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    Codebook,
    Int,
    NumberFormat,
    Offset,
    PerChannel,
    PerGroup,
    PerTensor,
    QTensor,
    QuantSpec,
    Tile,
    Unscaled,
    int_activation,
    int_weight,
    mx,
    nvfp4,
    quantize,
)
from qcore.packing import Bits, CompressedFloat, CompressedInt, CompressedPack, first_that_accepts
from qcore.testing import check_packing

EVERY = (CompressedPack(), CompressedInt(), CompressedFloat(), Bits())


def every_spec():
    yield from (int_weight(bits, group) for bits in range(1, 9) for group in (8, None))
    yield from (int_weight(bits, 8, asymmetric=True) for bits in range(2, 9))
    yield from (QuantSpec(format=Int(b, signed=False), granularity=PerGroup(8), offset=Offset.VALUE, scale="bfloat16") for b in (1, 3, 4))
    yield QuantSpec(format=Int(4, signed=False), granularity=PerGroup(8), offset=Offset.CODE)
    yield from (QuantSpec(format=Int(b), granularity=g) for b in (4, 8) for g in (PerTensor(), PerChannel(1), Tile(3, 5)))
    yield from (QuantSpec(format=f, granularity=PerChannel(0)) for f in (FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3, FP8_E5M2))
    yield from (QuantSpec(format=FP8_E4M3, granularity=g, scale="bfloat16") for g in (PerTensor(), Tile(128, 128), Tile(4, 3)))
    yield QuantSpec(format=FP8_E5M2, granularity=Unscaled())
    yield from (mx(f, group=8) for f in (FP4_E2M1, FP6_E3M2, Int(8)))
    yield replace(nvfp4(), granularity=PerGroup(8))
    # double quantization: scales in 8 bits, in groups, under float scales of their own; with a zero point, and with a float offset (Q4_K)
    double = QuantSpec(format=Int(6, signed=False), granularity=PerGroup(3))
    yield QuantSpec(format=Int(4), granularity=PerGroup(8), offset=Offset.CODE, scale=double)
    yield QuantSpec(format=Int(4, signed=False), granularity=PerGroup(8), offset=Offset.VALUE, scale=double)
    yield from (QuantSpec(format=Codebook(b, dim), granularity=PerGroup(8)) for b, dim in ((3, 1), (4, 2), (9, 4)))
    yield QuantSpec(format=Codebook(2, per_block=True), granularity=Tile(4, 8))


def sample(spec: QuantSpec, n: int | None = None, k: int = 24) -> QTensor:
    g = torch.Generator().manual_seed(3)
    if n is None:
        # enough vectors for a book of 512; whole tiles of 4 rows for books of blocks
        n = 10 if not isinstance(spec.format, Codebook) else 90 if spec.format.bits > 8 else 8
    return quantize(torch.randn(n, k, generator=g) * torch.rand(n, 1, generator=g), spec)


def assert_same_parts(a: QTensor, b: QTensor) -> None:
    assert a.shape == b.shape and a.spec == b.spec
    assert set(a.parts) == set(b.parts)
    for name in a.parts:
        assert a.parts[name].dtype == b.parts[name].dtype, name
        assert torch.equal(a.parts[name], b.parts[name]), name


def accepted():
    return [pytest.param(p, s, id=f"{p.name}-{s}-{s.scale}") for s in every_spec() for p in EVERY if p.refuses(s, sample(s).shape) is None]


@pytest.mark.parametrize(("packing", "spec"), accepted())
def test_unpacking_gives_every_part_back(packing, spec):
    q = sample(spec)
    parts = packing.pack(q)
    assert_same_parts(packing.unpack(parts, spec, q.shape), q)
    assert all(t.is_contiguous() for t in parts.values())


@pytest.mark.parametrize("spec", list(every_spec()), ids=str)
def test_bits_holds_every_spec_in_its_effective_bits(spec):
    q = sample(spec)
    parts = Bits().pack(q)
    fitted = sum(parts[p].numel() * parts[p].element_size() for p in spec.format.parts)
    stored = sum(t.numel() * t.element_size() for t in parts.values()) - fitted
    # rows of codes, zero points and nested scale codes start on a byte of their own: at most 4 such padded rows for each row here
    assert stored * 8 <= spec.bits_per_value(q.shape) * q.codes.numel() * spec.format.dim + 8 * 4 * q.shape[0]


@pytest.mark.parametrize("k", [1, 5, 31, 33])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_of_any_length(bits, k):
    spec = int_weight(bits)
    q = sample(spec, 5, k)
    for packing in EVERY:
        if packing.refuses(spec, q.shape) is None:
            assert_same_parts(packing.unpack(packing.pack(q), spec, q.shape), q)


def test_negative_scales_survive():
    q = sample(int_weight(4, 8))
    flipped = QTensor(q.spec, {"codes": q.codes, "scale": -q.parts["scale"]}, q.shape)
    for packing in (CompressedPack(), Bits()):
        assert_same_parts(packing.unpack(packing.pack(flipped), q.spec, q.shape), flipped)


def test_all_patterns_of_e4m3_survive_even_nan():
    spec = QuantSpec(format=FP8_E4M3, granularity=PerChannel(0))
    q = QTensor(spec, {"codes": torch.arange(256, dtype=torch.int16).to(torch.uint8).reshape(2, 128), "scale": torch.ones(2, 1)}, (2, 128))
    assert_same_parts(CompressedFloat().unpack(CompressedFloat().pack(q), spec, q.shape), q)


def test_golden_words_of_pack_quantized():
    # compressed-tensors 0.20 packs -8 … 7 into these two words
    spec = int_weight(4)
    q = QTensor(spec, {"codes": torch.arange(-8, 8, dtype=torch.int8).reshape(1, 16), "scale": torch.ones(1, 1)}, (1, 16))
    parts = CompressedPack().pack(q)
    assert [w & 0xFFFFFFFF for w in parts["weight_packed"].flatten().tolist()] == [0x76543210, 0xFEDCBA98]
    assert parts["weight_shape"].tolist() == [1, 16] and parts["weight_shape"].dtype == torch.int64
    assert parts["weight_scale"].shape == (1, 1) and parts["weight_scale"].dtype == torch.float16


@pytest.mark.parametrize(
    ("packing", "spec", "args"),
    [
        (CompressedPack(), int_weight(4, 8), {"num_bits": 4, "strategy": "group", "group_size": 8}),
        (CompressedPack(), int_weight(2), {"num_bits": 2, "strategy": "channel"}),
        (CompressedInt(), int_weight(8), {"num_bits": 8, "strategy": "channel"}),
        (CompressedInt(), QuantSpec(format=Int(8), granularity=PerTensor()), {"num_bits": 8, "strategy": "tensor"}),
        (CompressedFloat(), QuantSpec(format=FP8_E4M3, granularity=PerChannel(0)), {"num_bits": 8, "type": "float", "strategy": "channel"}),
        (
            CompressedFloat(),
            QuantSpec(format=FP8_E4M3, granularity=Tile(4, 3)),
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 3]},
        ),
    ],
    ids=lambda v: v.name if hasattr(v, "pack") else "",
)
def test_compressed_tensors_itself_reads_the_same_weight(packing, spec, args):
    ct = pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    q = sample(spec)
    codec = ct.compressors.base.BaseCompressor.load_from_registry(packing.format)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    theirs = codec.decompress(packing.pack(q), scheme)["weight"]
    # they multiply in the scale's dtype: one rounding of the float32 product
    assert torch.equal(theirs, q.dequantize().to(theirs.dtype))


@pytest.mark.parametrize("spec", list(every_spec()), ids=str)
def test_some_rows_alone_are_the_rows_of_the_whole(spec):
    q = sample(spec)
    index = torch.tensor([3, 0, 3, 7])
    for packing in EVERY:
        if packing.refuses(spec, q.shape):
            continue
        some = packing.rows(packing.pack(q), index, spec, q.shape)
        if some is None:
            assert isinstance(spec.granularity, Tile | PerChannel | Unscaled), f"{packing.name} should cut rows out of {spec}"
            continue
        got = packing.unpack(some, spec, (4, q.shape[1])).dequantize()
        assert torch.equal(got, q.dequantize()[index])


@pytest.mark.parametrize("packing", EVERY, ids=lambda p: p.name)
def test_packing_needs_no_values(packing):
    spec = {"ct-float": QuantSpec(format=FP8_E4M3, granularity=Tile(4, 3)), "ct-int": int_weight(8)}.get(packing.name, int_weight(4, 8))
    q = sample(spec)
    on_meta = QTensor(spec, {k: t.to("meta") for k, t in q.parts.items()}, q.shape)
    real, meta = packing.pack(q), packing.pack(on_meta)
    assert {k: (t.shape, t.dtype) for k, t in real.items()} == {k: (t.shape, t.dtype) for k, t in meta.items()}
    back = packing.unpack({k: t.to("meta") for k, t in meta.items()}, spec, q.shape)
    assert {k: (t.shape, t.dtype) for k, t in back.parts.items()} == {k: (t.shape, t.dtype) for k, t in q.parts.items()}


def test_the_first_that_accepts_depends_on_the_inputs():
    assert first_that_accepts(EVERY, int_weight(4, 8), (10, 24)).name == "ct-pack"
    assert first_that_accepts(EVERY, int_weight(8), (10, 24)).name == "ct-pack"
    assert first_that_accepts(EVERY, int_weight(8), (10, 24), int_activation()).name == "ct-int"
    assert first_that_accepts(EVERY, int_weight(4), (10, 24), int_activation()).name == "bits"
    assert first_that_accepts(EVERY, nvfp4(), (10, 32)).name == "bits"


def test_when_none_accepts_every_reason_is_given():
    with pytest.raises(SpecError, match=r"(?s)ct-pack: has no offset.*ct-int: holds signed 8-bit"):
        first_that_accepts(EVERY[:3], int_weight(4, 8, asymmetric=True), (10, 24))
    with pytest.raises(SpecError, match="group size 7 does not divide K=24"):
        first_that_accepts(EVERY, int_weight(4, 7), (10, 24))


def test_a_scale_that_would_move_is_refused():
    q = sample(int_weight(4, 8))
    off = QTensor(q.spec, {"codes": q.codes, "scale": q.parts["scale"] * 1.0001}, q.shape)
    for packing in (CompressedPack(), Bits()):
        with pytest.raises(SpecError, match="cannot hold it"):
            packing.pack(off)


def test_codes_out_of_range_are_refused():
    q = sample(int_weight(3, 8))
    with pytest.raises(SpecError, match=r"run from .* to 9, which 3 bits cannot hold"):
        Bits().pack(QTensor(q.spec, {**q.parts, "codes": q.codes.clone().fill_diagonal_(9)}, q.shape))


def test_stored_words_of_another_shape_are_refused():
    spec = int_weight(3, 8)
    parts = Bits().pack(sample(spec))
    with pytest.raises(SpecError, match="do not fit their spec"):
        Bits().unpack(parts, spec, (10, 32))
    parts = CompressedPack().pack(sample(int_weight(4, 8)))
    with pytest.raises(SpecError, match="does not fit its spec"):
        CompressedPack().unpack(parts, int_weight(4, 8), (10, 32))


@dataclass(frozen=True)
class SignedPowers(NumberFormat):
    """0, ±1, ±2, ±4 with signed codes, and of those that a plug-in may bring: nothing says that codes are int8."""

    name: ClassVar[str] = "signed-powers"
    bits: ClassVar[int] = 3
    lo: ClassVar[float] = -4.0
    hi: ClassVar[float] = 4.0
    fitted: bool = False

    @property
    def parts(self):
        return ("t",) if self.fitted else ()

    def fit(self, x, weight=None):
        return {"t": x.abs().amax(-1)} if self.fitted else {}

    def encode(self, x, params=None):
        return (x.sign() * (x.abs() > 0.5 * (params["t"] if self.fitted else 1))).to(torch.int8)

    def decode(self, codes, params=None):
        return codes.float() * (params["t"] if self.fitted else 1)


@pytest.mark.parametrize("fmt", [SignedPowers(), SignedPowers(fitted=True)], ids=str)
def test_formats_of_plug_ins_keep_their_codes(fmt):
    q = sample(QuantSpec(format=fmt, granularity=PerGroup(8)))
    assert q.codes.dtype == torch.int8 and (q.codes < 0).any()
    assert_same_parts(Bits().unpack(Bits().pack(q), q.spec, q.shape), q)


@pytest.mark.parametrize(
    ("packing", "spec"),
    [
        (CompressedPack(), int_weight(4, 32)),
        (CompressedInt(), int_weight(8)),
        (CompressedFloat(), QuantSpec(format=FP8_E4M3, granularity=Tile(4, 100), scale="bfloat16")),
        (Bits(), nvfp4()),
        (Bits(), int_weight(3, 32, asymmetric=True)),
        (Bits(), QuantSpec(format=Codebook(4, 2), granularity=PerGroup(32))),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_packings_keep_their_contract(packing, spec):
    check_packing(packing, spec)
