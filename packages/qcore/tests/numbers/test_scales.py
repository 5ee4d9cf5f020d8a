"""How scales are chosen and stored: float dtypes, shared exponents, scales of scales."""

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers import (
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    Int,
    Offset,
    PerChannel,
    PerGroup,
    PerTensor,
    PowerOfTwo,
    QuantSpec,
    fake_quantize,
    int_weight,
    mx,
    nvfp4,
    quantize,
    scale_parts,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_with(amax: float, size: int = 32) -> torch.Tensor:
    x = torch.zeros(1, size)
    x[0, 3], x[0, 5] = -amax, amax / 3
    return x


# float scales ----------------------------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_int4():
    low, high = torch.tensor([-3.5]), torch.tensor([10.2])
    symmetric = scale_parts(low, high, QuantSpec(format=Int(4), granularity=PerTensor()))
    assert symmetric["scale"].item() == pytest.approx(10.2 / 7)
    asymmetric = scale_parts(low, high, QuantSpec(format=Int(4), granularity=PerTensor(), offset=Offset.CODE))
    assert asymmetric["scale"].item() == pytest.approx((10.2 + 3.5) / 15)
    assert asymmetric["offset"].item() == round(-8 + 3.5 / ((10.2 + 3.5) / 15))


def test_one_signed_bit_keeps_the_largest_magnitude_and_empty_blocks_stay_zero():
    x = torch.tensor([[0.5, -2.0], [0.0, 0.0]])
    for dtype in ("float32", "float16", "bfloat16"):
        spec = QuantSpec(format=Int(1), granularity=PerChannel(0), scale=dtype)
        assert fake_quantize(x, spec).tolist() == [[2.0, -2.0], [0.0, 0.0]]


@pytest.mark.parametrize("fmt", [FP4_E2M1, FP8_E4M3, Int(1), Int(4)], ids=str)
def test_a_stored_offset_centres_the_grid_on_the_range(fmt):
    x = randn(3, 40) + 5
    x[:, 0] = 0  # the range includes zero
    spec = QuantSpec(format=fmt, granularity=PerChannel(0), offset=Offset.VALUE)
    q = quantize(x, spec)
    ends = torch.stack([x.amin(1), x.amax(1)], 1)
    torch.testing.assert_close(torch.stack([q.dequantize().amin(1), q.dequantize().amax(1)], 1), ends, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("offset", Offset)
def test_stored_scales_and_offsets_survive_their_dtype(dtype, offset):
    spec = QuantSpec(format=Int(4), granularity=PerGroup(13), offset=offset, scale=dtype)
    parts = quantize(randn(7, 130) * torch.logspace(-7, 3, 7).unsqueeze(1), spec).parts
    for name in ("scale", "offset") if offset is Offset.VALUE else ("scale",):
        assert parts[name].dtype == torch.float32
        assert torch.equal(parts[name].to(getattr(torch, dtype)).float(), parts[name])


@pytest.mark.parametrize("amax", [2e-3, 1e-4, 3e-6, 1e-7])
def test_small_blocks_are_not_erased_by_float16_scales(amax):
    x = torch.tensor([[amax, -amax / 2, amax / 3]])
    spec = int_weight(8, scale="float16")
    q = quantize(x, spec)
    stored = q.parts["scale"].item()
    assert stored >= amax / 127 * (1 - 2**-11)
    # subnormal scales are multiples of 2^-24
    assert stored <= amax / 127 * (1 + 2**-11) + 2**-24
    assert (q.dequantize() - x).abs().max() <= stored * 0.5 + amax * 2**-11


@pytest.mark.parametrize("offset", Offset)
def test_scales_that_overflow_float16_are_refused(offset):
    spec = QuantSpec(format=Int(2, signed=False), granularity=PerTensor(), offset=offset, scale="float16")
    with pytest.raises(SpecError, match=r"does not fit float16.*use scale 'bfloat16' or 'float32'"):
        quantize(torch.tensor([[-3e5, 3e5]]), spec)


def test_offsets_that_overflow_float16_are_refused():
    spec = QuantSpec(format=Int(8, signed=False), granularity=PerTensor(), offset=Offset.VALUE, scale="float16")
    with pytest.raises(SpecError, match=r"an offset of .* does not fit float16"):
        quantize(torch.tensor([[-3e5, 3e5]]), spec)


@pytest.mark.parametrize("offset", Offset)
def test_ranges_wider_than_float32_still_have_a_scale(offset):
    spec = QuantSpec(format=Int(8), granularity=PerTensor(), offset=offset)
    x = torch.tensor([-3e38, -1e38, 0.0, 3e38])
    torch.testing.assert_close(fake_quantize(x, spec), x, rtol=0, atol=3e36)


def test_values_that_float32_cannot_hold_are_refused():
    with pytest.raises(SpecError, match=r"1 of 3 values are NaN or infinite \(first at \(0, 2\)\)"):
        quantize(torch.tensor([[1.0, 2.0, 1e300]], dtype=torch.float64), int_weight(4))


# shared exponents (OCP MX v1.0, section 6.3) ---------------------------------------------------------------------------------------------


# codes of E8M0: exponent + 127
@pytest.mark.parametrize(
    ("amax", "floor", "ceil", "even"),
    [
        (3.5, 126, 127, 127),
        (7.0, 127, 128, 128),
        (6.0, 127, 127, 127),
        (1.0, 125, 125, 125),
        (2.0, 126, 126, 126),
        (4.0, 127, 127, 127),
        (2.0**-20, 105, 105, 105),
        (1.7, 125, 126, 125),
        (1.74, 125, 126, 125),
        (1.75, 125, 126, 126),
        (0.75, 124, 124, 124),
    ],
)
def test_shared_exponents_of_fp4(amax, floor, ceil, even):
    codes = {rule: quantize(block_with(amax), mx(FP4_E2M1, rule=rule)).parts["scale.codes"].item() for rule in ("floor", "ceil", "even")}
    assert codes == {"floor": floor, "ceil": ceil, "even": even}


@pytest.mark.parametrize("element", [FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3, Int(8), Int(4), Int(8, signed=False)], ids=str)
def test_ceil_never_saturates_and_is_the_least_that_does_not(element):
    amax = randn(200).abs() * torch.logspace(-20, 20, 200, base=2)
    scale = PowerOfTwo("ceil").choose_scale(amax, element)
    assert (amax <= scale * element.hi).all()
    assert (amax > scale / 2 * element.hi).all()


@pytest.mark.parametrize("element", [FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3, Int(8), Int(4), Int(8, signed=False)], ids=str)
def test_floor_is_the_exponent_of_ocp(element):
    amax = randn(200).abs() * torch.logspace(-20, 20, 200, base=2)
    emax = {6.0: 2, 7.5: 2, 28.0: 4, 448.0: 8, 127.0: 6, 7.0: 2, 255.0: 7}[element.hi]
    expected = torch.exp2(torch.log2(amax.double()).floor() - emax).float()
    assert torch.equal(PowerOfTwo("floor").choose_scale(amax, element), expected)


@pytest.mark.parametrize("element", [FP4_E2M1, FP6_E2M3, FP8_E4M3, Int(8), Int(8, signed=False)], ids=str)
def test_even_steps_up_where_the_largest_would_round_to_the_next_power_of_two(element):
    amax = torch.linspace(1, 2, 4097)[:-1]
    scale = PowerOfTwo("even").choose_scale(amax, element)
    floor = PowerOfTwo("floor").choose_scale(amax, element)
    mantissa = {6.0: 1, 7.5: 3, 448.0: 3, 127.0: 6, 255.0: 7}[element.hi]
    up = amax >= 2 - 2.0 ** -(mantissa + 1)
    assert torch.equal(scale, torch.where(up, 2 * floor, floor))


@pytest.mark.parametrize(("element", "bits"), [(FP4_E2M1, 4), (FP6_E2M3, 6)], ids=str)
def test_even_is_the_rule_of_compressed_tensors(element, bits):
    utils = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    amax = torch.cat([randn(500).abs() * torch.logspace(-20, 20, 500, base=2), torch.tensor([3.5, 7.0, 6.0, 1.0, 1.75, 1.875, 1.9375, 1.96875])])
    ours = PowerOfTwo().encode(PowerOfTwo("even").choose_scale(amax, element))
    assert torch.equal(ours.float(), utils.generate_mx_scales(amax.clone(), bits))


def test_mxint8_has_64_steps_to_one():
    q = quantize(block_with(1.0), mx(Int(8)))
    assert q.parts["scale.codes"].item() == 127 - 6
    assert q.codes[0, 3].item() == -64
    # the element's largest number is 127/64 = 1.984: 1.99 saturates upwards, and fits downwards
    x = block_with(1.9999)
    x[0, 0] = 1.9999
    assert fake_quantize(x, mx(Int(8)))[0, [0, 3]].tolist() == [127 / 64, -2.0]


def test_empty_blocks_have_scale_one():
    assert quantize(torch.zeros(2, 32), mx()).parts["scale.codes"].tolist() == [[127], [127]]


@pytest.mark.parametrize("exponent", [-140, -127, 126])
def test_shared_exponents_end_where_e8m0_does(exponent):
    x = block_with(float(torch.ldexp(torch.tensor(1.0, dtype=torch.float64), torch.tensor(exponent))))
    code = quantize(x, mx()).parts["scale.codes"].item()
    assert code == max(0, exponent - 2 + 127)


def test_every_power_of_two_is_kept():
    codes = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(PowerOfTwo().encode(PowerOfTwo().decode(codes)), codes)


def test_an_unknown_rule_is_refused():
    with pytest.raises(SpecError, match="have: floor, ceil, even"):
        PowerOfTwo("round")


# scales of scales ------------------------------------------------------------------------------------------------------------------------


def test_nvfp4_has_e4m3_block_scales_under_one_tensor_scale():
    x = randn(8, 64)
    q = quantize(x, nvfp4())
    tensor_scale = q.parts["scale.scale"]
    assert tensor_scale.shape == (1, 1)
    assert tensor_scale.item() == pytest.approx(x.abs().max().item() / (6 * 448), rel=1e-6)
    ideal = x.view(8, 4, 16).abs().amax(-1) / 6
    expected = (ideal / tensor_scale).to(torch.float8_e4m3fn)
    assert torch.equal(q.parts["scale.codes"], expected.view(torch.uint8))
    assert torch.equal(q.scale(), expected.float() * tensor_scale)
    # the block of the largest value has the largest E4M3 scale
    assert q.parts["scale.codes"].max().item() == 0x7E


def test_nvfp4_blocks_too_small_for_e4m3_become_zero():
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 1.0, 1e-9
    assert fake_quantize(x, nvfp4())[0, 16:].abs().max().item() == 0
