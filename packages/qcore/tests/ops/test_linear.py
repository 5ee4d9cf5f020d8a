from functools import partial

import pytest
import torch
from qcore.errors import NotFound, SpecError
from qcore.numbers import (
    FP8_E4M3,
    Codebook,
    Int,
    Offset,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    Tile,
    fp8_activation,
    int_activation,
    int_weight,
    mx,
    nvfp4,
    quantize,
)
from qcore.ops import Job, ReferenceLinear, TorchInt4Linear, TorchInt8DynamicLinear, choose
from qcore.packing import Bits, CompressedInt
from qcore.testing import check_kernel

SPECS = [
    int_weight(4, 16),
    int_weight(1, 16),
    int_weight(3, 16, asymmetric=True),
    QuantSpec(format=Int(4, signed=False), granularity=PerGroup(16), offset=Offset.VALUE),
    QuantSpec(format=FP8_E4M3, granularity=Tile(5, 7)),
    QuantSpec(format=Int(8), granularity=PerTensor()),
    mx(),
    nvfp4(),
    QuantSpec(format=Codebook(3), granularity=PerChannel(0)),
    QuantSpec(format=Codebook(2, per_block=True), granularity=PerGroup(32)),
]


def a_job(spec, n=48, k=64, *, activation=None, dtype=torch.float32, packing=None, seed=0):
    """(job, stored parts, the quantized weight)"""
    packing = packing or Bits()
    q = quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), spec)
    unpack = partial(packing.unpack, spec=spec, shape=(n, k))
    return Job("linear", packing.name, spec, (n, k), activation, dtype=dtype, unpack=unpack), packing.pack(q), q


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_reference_is_the_product_with_the_dequantized_weight(spec, dtype):
    job, parts, q = a_job(spec, dtype=dtype)
    x = torch.randn(2, 3, 64).to(dtype)
    y = ReferenceLinear()(x, parts, job)
    assert y.dtype == dtype
    assert torch.equal(y, torch.nn.functional.linear(x, q.dequantize().to(dtype)))


@pytest.mark.parametrize("activation", [int_activation(), fp8_activation(), int_activation(4)], ids=str)
def test_inputs_are_quantized_row_by_row(activation):
    job, parts, q = a_job(int_weight(8), activation=activation)
    x = torch.randn(2, 3, 64)
    rows = [quantize(row.reshape(1, -1), activation).dequantize() for row in x.reshape(-1, 64)]
    want = torch.cat(rows) @ q.dequantize().T
    # the product of 6 rows and of one row add in different orders: a few float32 ulps of sums of 64 terms near 10
    torch.testing.assert_close(ReferenceLinear()(x, parts, job).reshape(-1, 48), want, rtol=0, atol=1e-5)


def test_static_inputs_use_the_stored_scale():
    static = QuantSpec(format=Int(8), granularity=PerTensor())
    job, parts, q = a_job(int_weight(8), activation=static)
    x = torch.linspace(-3, 3, 128).reshape(2, 64)
    y = ReferenceLinear()(x, {**parts, "input.scale": torch.full((1, 1), 0.5)}, job)
    assert torch.equal(y, (x / 0.5).round() * 0.5 @ q.dequantize().T)
    with pytest.raises(SpecError, match="static, but its scale was not given"):
        ReferenceLinear()(x, parts, job)


@pytest.mark.parametrize("packing", [CompressedInt(), Bits()], ids=lambda p: p.name)
@pytest.mark.parametrize("spec", [int_weight(8), QuantSpec(format=Int(8), granularity=PerTensor())], ids=str)
def test_int8_kernel_agrees_with_the_reference(packing, spec):
    job, parts, _ = a_job(spec, activation=int_activation(), packing=packing)
    kernel = TorchInt8DynamicLinear()
    assert kernel.refuses(job) is None
    x = torch.randn(2, 5, 64)
    # both hold the same int8 codes; the reference adds 64 float32 products, this one integers
    torch.testing.assert_close(kernel(x, kernel.prepare(parts, job), job), ReferenceLinear()(x, parts, job), rtol=1e-5, atol=1e-5)


def test_int8_kernel_shares_the_stored_codes():
    job, parts, _ = a_job(int_weight(8), activation=int_activation(), packing=CompressedInt())
    assert TorchInt8DynamicLinear().prepare(parts, job)["codes"].data_ptr() == parts["weight"].data_ptr()


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("group", [32, 64])
def test_int4_kernel_agrees_with_the_reference(group, rows):
    job, parts, q = a_job(int_weight(4, group, scale="bfloat16"), k=128, dtype=torch.bfloat16)
    kernel = TorchInt4Linear()
    assert kernel.refuses(job) is None
    x = torch.randn(rows, 128).bfloat16()
    exact = x.double() @ q.dequantize().double().T
    y = kernel(x, kernel.prepare(parts, job), job)
    # one rounding to bfloat16 (2^-8 relative), of sums that are near zero by cancellation now and then
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2e-2)
    with pytest.raises(SpecError, match="bound for bfloat16"):
        kernel(x.float(), kernel.prepare(parts, job), job)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "needs bfloat16 inputs"),
        ({"spec": int_weight(4, 16, scale="bfloat16")}, "needs groups of 32"),
        ({"spec": int_weight(4, scale="bfloat16")}, "needs groups of 32"),
        ({"spec": int_weight(4, 32, scale="float16")}, "would move scales of float16"),
        ({"spec": int_weight(4, 32, asymmetric=True, scale="bfloat16")}, "needs symmetric 4-bit"),
        ({"spec": int_weight(3, 32, scale="bfloat16")}, "needs symmetric 4-bit"),
        ({"n": 40}, "N divisible by 16"),
        ({"activation": int_activation()}, "needs float inputs"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_int4_kernel_says_why_it_refuses(change, reason):
    job, _, _ = a_job(**{"spec": int_weight(4, 32, scale="bfloat16"), "dtype": torch.bfloat16} | change)
    assert reason in TorchInt4Linear().refuses(job)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": None}, "got float inputs"),
        ({"activation": int_activation(4)}, "needs dynamic symmetric 8-bit inputs"),
        ({"activation": QuantSpec(format=Int(8), granularity=PerTensor())}, "needs dynamic symmetric 8-bit inputs"),
        ({"spec": int_weight(8, 16)}, "per channel or tensor"),
        ({"spec": int_weight(8, asymmetric=True)}, "symmetric 8-bit weights"),
        ({"spec": QuantSpec(format=Int(8), granularity=PerChannel(1))}, "axis 0"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_int8_kernel_says_why_it_refuses(change, reason):
    job, _, _ = a_job(**{"spec": int_weight(8), "activation": int_activation()} | change)
    assert reason in TorchInt8DynamicLinear().refuses(job)


def test_choice_takes_the_best_and_keeps_the_reasons():
    job, _, _ = a_job(int_weight(8), activation=int_activation())
    every = (ReferenceLinear(), TorchInt4Linear(), TorchInt8DynamicLinear())
    assert choose(every, job).kernel.name == "torch-int8-dynamic-linear"
    plain, _, _ = a_job(int_weight(8))
    choice = choose(every, plain)
    assert choice.kernel.name == "reference-linear"
    assert [name for name, _ in choice.refused] == ["torch-int8-dynamic-linear", "torch-int4-linear"]
    with pytest.raises(NotFound, match="torch-int4-linear: needs bfloat16"):
        choose((TorchInt4Linear(),), plain)


@pytest.mark.parametrize("kernel", [ReferenceLinear(), TorchInt8DynamicLinear()], ids=lambda k: k.name)
def test_no_rows_give_no_rows(kernel):
    job, parts, _ = a_job(int_weight(8), activation=int_activation())
    assert kernel(torch.zeros(0, 64), kernel.prepare(parts, job), job).shape == (0, 48)


@pytest.mark.parametrize(
    ("kernel", "packing", "spec", "more"),
    [
        (ReferenceLinear(), Bits(), int_weight(3, 16, asymmetric=True), {}),
        (ReferenceLinear(), Bits(), nvfp4(), {"activation": fp8_activation()}),
        (TorchInt8DynamicLinear(), CompressedInt(), int_weight(8), {"activation": int_activation()}),
        # one rounding to bfloat16
        (TorchInt4Linear(), Bits(), int_weight(4, 32, scale="bfloat16"), {"dtype": torch.bfloat16, "rtol": 2**-8}),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_kernels_keep_their_contract(kernel, packing, spec, more):
    check_kernel(kernel, packing, spec, **more)
