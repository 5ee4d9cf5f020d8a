"""Specs: what they refuse, cost, and look like as plain data."""

import json
from dataclasses import replace

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers import (
    FP6_E3M2,
    FP8_E5M2,
    Codebook,
    Float,
    Int,
    Offset,
    PerChannel,
    PerGroup,
    PerTensor,
    PowerOfTwo,
    QuantSpec,
    Tile,
    Unscaled,
    fp8_activation,
    fp8_weight,
    int_activation,
    int_weight,
    mx,
    nvfp4,
    quantize,
    spec_from_dict,
    spec_to_dict,
)

FORMATS = {c.name: c for c in (Int, Float, PowerOfTwo, Codebook)}
SPECS = [
    int_weight(4, 64),
    int_weight(3, asymmetric=True),
    int_activation(),
    fp8_weight(),
    fp8_activation(),
    mx(),
    mx(Int(8), rule="even"),
    mx(FP6_E3M2, rule="ceil"),
    nvfp4(),
    QuantSpec(format=FP8_E5M2, granularity=Unscaled()),
    QuantSpec(format=Codebook(4, dim=2, per_block=True, iterations=3), granularity=Tile(16, 64), offset=Offset.VALUE, scale="bfloat16"),
    QuantSpec(format=Int(4), granularity=PerGroup(32), scale=QuantSpec(format=Int(6, signed=False), granularity=PerGroup(8), scale="float16")),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_spec_survives_json(spec):
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec))), FORMATS) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formt": {}}, "unknown field 'formt' in a quantization spec; have: format, granularity, offset, scale, when"),
        ({"format": {"name": "int", "bits": 4, "sign": True}}, "format 'int' has no field 'sign'; have: bits, signed"),
        ({"format": {"name": "int"}}, "format 'int'.*bits"),
        ({"format": {"bits": 4}}, "a format has no 'name'"),
        ({"format": {"name": "unheard"}}, "unknown format 'unheard'; have: codebook, e8m0, float, int"),
        ({"format": None}, "no 'format'"),
        ({"granularity": None}, "no 'granularity'"),
        ({"granularity": {"name": "group", "sise": 64}}, "granularity 'group' has no field 'sise'; have: size"),
        ({"granularity": {"name": "row"}}, "unknown granularity 'row'; have: "),
        ({"offset": "zero"}, "unknown offset 'zero'; have: none, code, value"),
        ({"scale": "float64"}, "unknown scale dtype 'float64'; have: float32, float16, bfloat16"),
        ({"scale": {"format": {"name": "e8m0", "rul": "even"}, "granularity": {"name": "unscaled"}}}, "format 'e8m0' has no field 'rul'"),
        ({"when": "later"}, "'later'.*static.*dynamic"),
    ],
    ids=str,
)
def test_plain_data_that_is_no_spec_is_refused_with_what_there_is(change, message):
    d = {**spec_to_dict(int_weight(4, 64)), **change}
    with pytest.raises(SpecError, match=message):
        spec_from_dict({k: v for k, v in d.items() if v is not None}, FORMATS)


def test_missing_fields_have_their_defaults():
    short = {"format": {"name": "int", "bits": 8}, "granularity": {"name": "tensor"}}
    assert spec_from_dict(short, FORMATS) == QuantSpec(format=Int(8), granularity=PerTensor())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": FP8_E5M2, "offset": Offset.CODE}, "integers of 2 bits or more"),
        ({"format": Int(1), "offset": Offset.CODE}, "integers of 2 bits or more"),
        ({"granularity": Unscaled(), "offset": Offset.VALUE}, "'unscaled' has no offset"),
        ({"scale": "float8"}, "unknown scale dtype 'float8'"),
        ({"scale": int_weight(4, asymmetric=True)}, "a scale's own spec cannot have an offset"),
        ({"when": "sometimes"}, "'sometimes'"),
    ],
    ids=str,
)
def test_impossible_specs_are_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec(**{"format": Int(4), "granularity": PerChannel(0), **fields})


@pytest.mark.parametrize("bits", [0, 9, -1])
@pytest.mark.parametrize("signed", [True, False])
def test_integers_have_one_to_eight_bits(bits, signed):
    with pytest.raises(SpecError, match=f"1 to 8 bits, got bits={bits}"):
        Int(bits, signed=signed)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (int_weight(4, 64), 4 + 16 / 64),
        (int_weight(4, 64, asymmetric=True), 4 + 16 / 64 + 4 / 64),
        (int_weight(8), 8 + 16 / 256),
        (replace(int_weight(4, 64), offset=Offset.VALUE), 4 + 32 / 64),
        (int_activation(), 8),
        (fp8_weight(), 8 + 32 / 256),
        (mx(), 4 + 8 / 32),
        (mx(Int(8)), 8 + 8 / 32),
        (nvfp4(), 4 + 8 / 16 + 32 / (64 * 256)),
        (QuantSpec(format=FP8_E5M2, granularity=Unscaled()), 8),
        (QuantSpec(format=Codebook(8, dim=4), granularity=PerChannel(0), scale="float16"), 2 + 16 / 256),
        (QuantSpec(format=Int(4), granularity=Tile(60, 100), scale="float16"), 4 + 16 * 2 * 3 / (64 * 256)),
        (
            QuantSpec(
                format=Int(4), granularity=PerGroup(32), scale=QuantSpec(format=Int(6, signed=False), granularity=PerGroup(8), scale="float16")
            ),
            4 + 6 / 32 + 16 / 256,
        ),
    ],
    ids=str,
)
def test_effective_bits_of_a_64_by_256_weight(spec, bits):
    assert spec.bits_per_value((64, 256)) == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.when == "static" and s.scaled], ids=str)
def test_effective_bits_count_the_parts_that_are_stored(spec):
    q = quantize(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), spec)

    def stored_bits(q) -> float:
        own = q.codes.numel() * q.spec.format.bits
        if not q.spec.scaled:
            return own
        nested = isinstance(q.spec.scale, QuantSpec)
        width = {"float32": 32, "float16": 16, "bfloat16": 16}.get(q.spec.scale if not nested else "", 32)
        own += stored_bits(q._scale_tensor()) if nested else q.parts["scale"].numel() * width
        if "offset" in q.parts:
            own += q.parts["offset"].numel() * (q.spec.format.bits if q.spec.offset is Offset.CODE else width)
        return own

    assert spec.bits_per_value((64, 256)) == pytest.approx(stored_bits(q) / (64 * 256), abs=1e-12)


def test_specs_are_read_aloud():
    assert [str(s) for s in SPECS[:4]] == [
        "int4 per group 64, scale float16",
        "int3 per channel +zero-point, scale float16",
        "int8 per token dynamic",
        "fp8-e4m3 per channel",
    ]
