"""The native kernels against their references: every instruction set of this processor, shapes that nothing divides, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qkernels import int_linear, native, panels, quantize_rows, weight_linear

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

EVERY_ISA = [name for name, _, _ in native.extension().available()] if native.why_not() is None else []
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def a_weight(n, k, group, bits, *, shifted=False, scale=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (n, k), generator=g, dtype=torch.int8)
    scales = (torch.rand(n, k // group, generator=g) * 0.02 + 1e-3).to(scale)
    return codes, scales, torch.randn(n, k // group, generator=g) * 0.05 if shifted else None


def bound_of_sums(x, codes, scale, shift=None):
    """What rounding may add up to: one float32 rounding for each addition, of partial sums no larger than the sum of absolute products."""
    w = weight_linear.reference.dequantize(codes, scale).abs()
    if shift is not None:
        w = w + shift.abs().repeat_interleave(codes.shape[1] // shift.shape[1], 1)
    size = x.double().abs().reshape(-1, x.shape[-1]) @ w.double().T
    # additions of random signs: the square root of their number stands for it, with room
    return size * 2.0**-24 * (4 + x.shape[-1] ** 0.5)


@st.composite
def problems(draw):
    bits = draw(st.sampled_from((4, 8)))
    step = 32 // bits
    group = step * draw(st.integers(1, 40))
    k = group * draw(st.integers(1, 6))
    return {
        "bits": bits,
        "group": group,
        "k": k,
        "n": draw(st.integers(1, 70)),
        "t": draw(st.sampled_from((1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 25, 40, 197))),
        "shifted": draw(st.booleans()),
        "scale": draw(st.sampled_from(panels.reference.SCALES)),
        "dtype": draw(st.sampled_from(tuple(EPS))),
        "isa": draw(st.sampled_from(EVERY_ISA)),
        "seed": draw(st.integers(0, 999)),
    }


@given(problems())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_shape_group_and_dtype_agrees_with_the_reference(p):
    weight = a_weight(p["n"], p["k"], p["group"], p["bits"], shifted=p["shifted"], scale=p["scale"], seed=p["seed"])
    laid = panels.pack(*weight, bits=p["bits"])
    x = torch.randn(p["t"], p["k"], generator=torch.Generator().manual_seed(p["seed"])).to(p["dtype"])
    eps = EPS[p["dtype"]] if p["dtype"] != torch.float32 else 0.0

    exact = x.double() @ weight_linear.reference.dequantize(*weight).double().T
    y = weight_linear.cpu.weight_linear(x, laid, isa=p["isa"])
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound_of_sums(x, *weight) + eps * exact.abs() + 1e-7).all()

    exact = int_linear.reference.int_linear(x.float(), *weight).double()
    y = int_linear.cpu.int_linear(x, laid, isa=p["isa"])
    # sums inside a group are exact: what remains are the additions of groups
    assert ((y.double() - exact).abs() <= bound_of_sums(x, *weight) + (eps + 2.0**-23) * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [(576, 576, 64), (192, 576, 576), (576, 1536, 192), (64, 4096, 128)])
def test_the_shapes_of_small_models(n, k, group, bits, isa):
    weight = a_weight(n, k, group, bits)
    laid = panels.pack(*weight, bits=bits)
    for t in (1, 33):
        x = torch.randn(t, k, generator=torch.Generator().manual_seed(t))
        exact = x.double() @ weight_linear.reference.dequantize(*weight).double().T
        bound = bound_of_sums(x, *weight)
        assert ((weight_linear.cpu.weight_linear(x, laid, isa=isa) - exact).abs() <= bound).all()
        exact = int_linear.reference.int_linear(x.double(), *weight)
        assert ((int_linear.cpu.int_linear(x, laid, isa=isa) - exact).abs() <= bound).all()


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_and_inputs_do_not_overflow(bits, isa):
    low = -(1 << (bits - 1))
    for t in (1, 2, 40):
        codes = torch.full((16, 8192), low, dtype=torch.int8)
        x = torch.full((t, 8192), -128.0)
        y = int_linear.cpu.int_linear(x, panels.pack(codes, torch.ones(16, 1), bits=bits), isa=isa)
        assert torch.equal(y, torch.full((t, 16), float(low * -128 * 8192)))


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("t", [1, 2, 7])
def test_float_inputs_lose_at_most_2_to_the_minus_23_of_the_largest_in_their_group(t, isa):
    codes, scale, _ = a_weight(40, 256, 64, 4)
    g = torch.Generator().manual_seed(t)
    # six orders of magnitude in a group, and groups of very large, very small and no inputs
    x = torch.randn(t, 256, generator=g) * torch.logspace(-3, 3, 64).repeat(4) * torch.tensor([1e-30, 1e30, 0.0, 1.0]).repeat_interleave(64)
    w = weight_linear.reference.dequantize(codes, scale)
    largest = x.abs().unflatten(1, (4, 64)).amax(-1, keepdim=True).expand(-1, -1, 64).flatten(1)
    bound = bound_of_sums(x, codes, scale) + largest.double() @ w.double().abs().T * 2.0**-23
    y = weight_linear.cpu.weight_linear(x, panels.pack(codes, scale, bits=4), isa=isa)
    assert ((y - x.double() @ w.double().T).abs() <= bound).all()


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_that_float32_holds_are_exact(dtype, isa):
    codes, scale, _ = a_weight(33, 128, 32, 4)
    # 8 bits of mantissa and 15 of range: all of it in 24 bits, and sums of 32 such products with 4-bit codes in 32
    x = (torch.randint(-255, 256, (5, 128), generator=torch.Generator().manual_seed(0)) * 2.0 ** -torch.arange(4).repeat(32)).to(dtype)
    ones = torch.ones_like(scale)
    want = x.double() @ codes.double().T
    assert torch.equal(weight_linear.cpu.weight_linear(x.float(), panels.pack(codes, ones, bits=4), isa=isa).double(), want)
    assert torch.equal(weight_linear.cpu.weight_linear(x, panels.pack(codes, ones, bits=4), isa=isa), want.to(dtype))


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("t", [1, 6])
def test_nan_and_infinity_come_through_float_inputs(t, isa):
    weight = a_weight(20, 64, 32, 4, shifted=True)
    x = torch.randn(t, 64, generator=torch.Generator().manual_seed(0))
    x[0, 3] = float("inf")
    x[-1, 40] = float("nan")
    want = x @ weight_linear.reference.dequantize(*weight).T
    y = weight_linear.cpu.weight_linear(x, panels.pack(*weight, bits=4), isa=isa)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    fine = want.isfinite()
    assert torch.allclose(y[fine], want[fine], atol=1e-4)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_rows_are_quantized_bit_for_bit(dtype, isa):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(60, 577, generator=g) * torch.logspace(-12, 4, 60)[:, None]).to(dtype)
    x[3], x[4], x[5] = 0, -x[4].abs(), x[5].abs()
    x[6, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.5]).to(dtype)  # ties
    x[6, 8:] = 0
    for scale in (None, torch.tensor(0.037)):
        mine, theirs = quantize_rows.cpu.quantize_rows(x, scale, isa=isa), quantize_rows.reference.quantize_rows(x, scale)
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_static_inputs_use_the_given_scale(isa):
    weight = a_weight(24, 64, 32, 4, shifted=True)
    x = torch.linspace(-3, 3, 192).reshape(3, 64)
    scale = torch.tensor(0.02)  # clips beyond 2.54
    y = int_linear.cpu.int_linear(x, panels.pack(*weight, bits=4), scale, isa=isa)
    torch.testing.assert_close(y, int_linear.reference.int_linear(x, *weight, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_panels_give_back_what_was_packed(bits):
    weight = a_weight(37, 192, 24, bits, shifted=True, scale=torch.bfloat16)
    for got, want in zip(panels.unpack(panels.pack(*weight, bits=bits)), weight, strict=True):
        assert torch.equal(got, want)


def test_a_panel_lies_as_it_is_drawn():
    codes = torch.zeros(17, 16, dtype=torch.int8)
    codes[2] = torch.arange(16) - 8
    laid = panels.pack(codes, torch.ones(17, 1), bits=4)
    assert laid.codes.shape == (2, 2, 16, 4)
    # inputs 0 … 3 in the low nibbles, 4 … 7 in the high ones, raised by 8
    assert laid.codes[0, 0, 2].tolist() == [0x40, 0x51, 0x62, 0x73]
    assert laid.codes[0, 1, 2].tolist() == [0xC8, 0xD9, 0xEA, 0xFB]
    assert (laid.codes[0, :, 3] == 0x88).all()


def test_inputs_may_be_strided_or_empty_and_are_left_alone():
    weight = a_weight(20, 64, 32, 4)
    laid = panels.pack(*weight, bits=4)
    x = torch.randn(64, 6).t()
    kept = x.clone()
    for call in (weight_linear.cpu.weight_linear, int_linear.cpu.int_linear):
        assert torch.equal(call(x, laid), call(x.contiguous(), laid)) and torch.equal(x, kept)
        assert call(torch.zeros(0, 64), laid).shape == (0, 20)
        assert call(torch.randn(2, 3, 64), laid).shape == (2, 3, 20)
    codes, scale = quantize_rows.cpu.quantize_rows(torch.zeros(0, 64))
    assert codes.shape == (0, 64) and scale.shape == (0, 1)


def test_the_number_of_threads_changes_no_bit():
    assert native.shares_threads()
    weight = a_weight(515, 1024, 64, 4)
    laid = panels.pack(*weight, bits=4)
    before = torch.get_num_threads()
    try:
        for t in (1, 70):
            x = torch.randn(t, 1024)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append((weight_linear.cpu.weight_linear(x, laid), int_linear.cpu.int_linear(x, laid)))
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, s: panels.pack(w, s, bits=3), "bits: got 3; allowed: 4, 8"),
        (lambda w, s: panels.pack(w.int(), s, bits=4), r"codes: has shape \[16, 64\], torch.int32; allowed: \[N, K\] int8"),
        (lambda w, s: panels.pack(w, s.double(), bits=4), r"scale: has shape .* torch.float64; allowed: .*float32, float16, bfloat16"),
        (lambda w, s: panels.pack(w, torch.ones(16, 3), bits=4), r"scale: has shape \[16, 3\].* groups of K=64"),
        (lambda w, s: panels.pack(w, torch.ones(16, 16), bits=4), "16 groups of K=64 are 4 inputs each; allowed: multiples of 8 for 4 bits"),
        (lambda w, s: panels.pack(w, s, torch.ones(16, 1), bits=4), r"shift: has shape \[16, 1\], float32; allowed: \[16, 2\]"),
        (lambda w, s: panels.pack(w * 0 + 9, s, bits=4), "codes: run from 9 to 9; allowed: -8 … 7"),
        (lambda w, s: weight_linear.cpu.weight_linear(torch.zeros(2, 63), panels.pack(w, s, bits=4)), r"x: has shape \[2, 63\].*\[\.\.\., 64\]"),
        (lambda w, s: weight_linear.cpu.weight_linear(torch.zeros(2, 64).double(), panels.pack(w, s, bits=4)), "torch.float64.*float32, float16"),
        (lambda w, s: weight_linear.cpu.weight_linear(torch.zeros(2, 64, device="meta"), panels.pack(w, s, bits=4)), "on meta; allowed: .* on cpu"),
        (lambda w, s: int_linear.cpu.int_linear(torch.full((2, 64), float("nan")), panels.pack(w, s, bits=4)), "NaN or infinity"),
        (lambda w, s: quantize_rows.cpu.quantize_rows(torch.tensor([[1.0, float("-inf")]])), "NaN or infinity"),
        (lambda w, s: weight_linear.cpu.weight_linear(torch.zeros(2, 64), panels.pack(w, s, bits=4), isa="neon"), "isa: 'neon' does not run"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 2))
