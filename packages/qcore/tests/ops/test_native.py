"""The binding of the native kernels: what they accept, what they compute, and that results change only by wish."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from qcore.errors import SpecError
from qcore.modules import QuantizedLinear
from qcore.numbers import FP8_E4M3, Int, Offset, PerChannel, PerGroup, PerTensor, QuantSpec, Tile, int_activation, int_weight, quantize
from qcore.ops import KERNELS, Job, NativeInt8ByWish, NativeInt8Linear, NativeWeightLinear, ReferenceLinear, choose
from qcore.packing import Bits, CompressedPack
from qcore.testing import check_kernel
from qkernels import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

NESTED = QuantSpec(format=Int(6, signed=False), granularity=PerGroup(8))
SPECS = [
    int_weight(4, 32),
    int_weight(4, 64, asymmetric=True, scale="bfloat16"),
    int_weight(8),
    int_weight(8, 32, asymmetric=True, scale="float32"),
    int_weight(3, 16),
    int_weight(2, 32, asymmetric=True),
    QuantSpec(format=Int(4, signed=False), granularity=PerGroup(16), offset=Offset.VALUE),
    QuantSpec(format=Int(5, signed=False), granularity=PerGroup(16), offset=Offset.CODE),
    QuantSpec(format=Int(4, signed=False), granularity=PerGroup(16), scale=NESTED),
    QuantSpec(format=Int(8), granularity=PerTensor()),
]


def a_job(spec, n=48, k=64, *, activation=None, dtype=torch.float32):
    q = quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)) / k**0.5, spec)
    unpack = partial(Bits().unpack, spec=spec, shape=(n, k))
    return Job("linear", "bits", spec, (n, k), activation, dtype=dtype, unpack=unpack), Bits().pack(q)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_integer_weight_keeps_the_contract(spec):
    check_kernel(NativeWeightLinear(), Bits(), spec, rtol=2e-6)  # float32 sums of 128 products
    check_kernel(NativeInt8Linear(), Bits(), spec, activation=int_activation(), rtol=2e-6)
    check_kernel(NativeWeightLinear(), Bits(), spec, dtype=torch.bfloat16, rtol=2**-8)  # one rounding of the output
    check_kernel(NativeWeightLinear(), Bits(), spec, dtype=torch.float16, rtol=2**-11)


def test_static_inputs_use_the_stored_scale():
    static = QuantSpec(format=Int(8), granularity=PerTensor())
    job, parts = a_job(int_weight(4, 32), activation=static)
    kernel = NativeInt8Linear()
    assert kernel.refuses(job) is None
    parts = {**parts, "input.scale": torch.full((1, 1), 0.02)}
    x = torch.linspace(-3, 3, 128).reshape(2, 64)  # clips beyond 2.54
    torch.testing.assert_close(kernel(x, kernel.prepare(parts, job), job), ReferenceLinear()(x, parts, job), rtol=1e-5, atol=1e-5)
    with pytest.raises(SpecError, match="static, but its scale was not given"):
        kernel.prepare({k: v for k, v in parts.items() if k != "input.scale"}, job)


@pytest.mark.parametrize(
    ("kernel", "change", "reason"),
    [
        (NativeWeightLinear(), {"activation": int_activation()}, "needs float inputs, got int8"),
        (NativeWeightLinear(), {"spec": QuantSpec(format=FP8_E4M3, granularity=PerChannel(0))}, "needs integers of 2 to 8 bits"),
        (NativeWeightLinear(), {"spec": QuantSpec(format=Int(4), granularity=Tile(16, 16))}, "needs scales per group, output channel or tensor"),
        (NativeWeightLinear(), {"spec": QuantSpec(format=Int(4), granularity=PerChannel(1))}, "per group, output channel or tensor"),
        (NativeWeightLinear(), {"spec": int_weight(4, 4)}, "needs groups of a multiple of 8 inputs, got 4"),
        (NativeWeightLinear(), {"dtype": torch.float64}, "float32, float16, bfloat16, got float64"),
        (NativeInt8Linear(), {}, "needs symmetric 8-bit inputs, got float inputs"),
        (NativeInt8Linear(), {"activation": int_activation(4)}, "needs symmetric 8-bit inputs"),
        (NativeInt8ByWish(), {"activation": int_activation()}, "is for layers with float inputs"),
    ],
)
def test_a_kernel_says_why_it_refuses(kernel, change, reason):
    job, _ = a_job(**{"spec": int_weight(4, 32)} | change)
    assert reason in kernel.refuses(job)
    on_gpu = replace(job, device=torch.device("meta"), activation=int_activation() if isinstance(kernel, NativeInt8Linear) else None)
    assert kernel.refuses(on_gpu) is not None


def test_inputs_are_rounded_only_by_wish():
    every = [k() for k in KERNELS]
    job, parts = a_job(int_weight(4, 32))
    choice = choose(every, job)
    assert choice.kernel.name == "native-weight-linear"
    assert choice.refused[0][0] == "native-int8-by-wish" and "only where it is asked for" in choice.refused[0][1]
    assert choose(every, replace(job, activation=int_activation())).kernel.name == "native-int8-linear"
    wished = choose(every, job, wish="native-int8-by-wish").kernel
    assert wished.name == "native-int8-by-wish"
    x = torch.randn(3, 64)
    y = wished(x, wished.prepare(parts, job), job)
    rounded = ReferenceLinear()(x, parts, replace(job, activation=int_activation()))
    torch.testing.assert_close(y, rounded, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, ReferenceLinear()(x, parts, job), rtol=1e-5, atol=1e-5)


def test_a_wish_is_remembered_when_the_module_moves():
    q = quantize(torch.randn(32, 64), int_weight(4, 32))
    leaf = QuantizedLinear(CompressedPack().pack(q), q.spec, q.shape, CompressedPack()).bind([k() for k in KERNELS], wish="native-int8-by-wish")
    assert leaf.to(torch.bfloat16).explain().kernel.name == "native-int8-by-wish"
    assert leaf(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_gradients_of_the_input_come_from_the_reference():
    q = quantize(torch.randn(32, 64), int_weight(4, 32))
    leaf = QuantizedLinear(CompressedPack().pack(q), q.spec, q.shape, CompressedPack()).bind([k() for k in KERNELS])
    x = torch.randn(3, 64, requires_grad=True)
    leaf(x).sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(3, 64))


def test_exported_programs_hold_no_native_call():
    q = quantize(torch.randn(32, 64), int_weight(4, 32))
    leaf = QuantizedLinear(CompressedPack().pack(q), q.spec, q.shape, CompressedPack()).bind([k() for k in KERNELS])
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    exported = torch.export.export(leaf, (x,))
    assert not any("qkernels" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(other), leaf(other), rtol=1e-5, atol=1e-5)


def test_compiled_models_keep_the_kernel_in_one_graph():
    q = quantize(torch.randn(32, 64), int_weight(4, 32))
    leaf = QuantizedLinear(CompressedPack().pack(q), q.spec, q.shape, CompressedPack()).bind([k() for k in KERNELS])
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(torch.compile(leaf, backend="eager", fullgraph=True)(x), leaf(x))


@pytest.mark.parametrize("dtype", native.TYPES)
@pytest.mark.parametrize("int8_inputs", [False, True])
def test_the_compiled_operator_is_what_torch_expects_of_one(dtype, int8_inputs):
    kernel = NativeInt8Linear() if int8_inputs else NativeWeightLinear()
    job, parts = a_job(int_weight(4, 32), activation=int_activation() if int8_inputs else None)
    p = kernel.prepare(parts, job)
    n, k = job.shape
    args = (torch.randn(2, 3, k).to(dtype), p["native.codes"], p["native.scale"], p.get("native.shift"), n, k, 32, 4, int8_inputs, None)
    torch.library.opcheck(native.compiled_linear, args)
    assert torch.equal(native.compiled_linear(*args), kernel(args[0], p, replace(job, dtype=dtype)))


def test_what_has_no_code_is_an_error():
    job, parts = a_job(int_weight(4, 32), activation=int_activation())
    kernel = NativeInt8Linear()
    with pytest.raises(SpecError, match="native-int8-linear: x: holds NaN or infinity"):
        kernel(torch.full((1, 64), float("nan")), kernel.prepare(parts, job), job)


def test_without_the_extension_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "qkernels was installed without its native kernels"))
    job, _ = a_job(int_weight(4, 32))
    choice = choose([k() for k in KERNELS], job)
    assert choice.kernel.name == "reference-linear"
    assert any("installed without its native kernels" in reason for _, reason in choice.refused)
