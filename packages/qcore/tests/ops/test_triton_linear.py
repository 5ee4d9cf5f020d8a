"""The binding of the Triton kernels: what they accept, that a GPU chooses them, and what they compute, by the interpreter if need be."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from qcore.errors import SpecError
from qcore.modules import QuantizedLinear
from qcore.numbers import FP8_E4M3, Int, Offset, PerChannel, PerGroup, PerTensor, QuantSpec, int_activation, int_weight, nvfp4, quantize
from qcore.numbers.spec import mx
from qcore.ops import KERNELS, Job, ReferenceLinear, choose, triton_linear
from qcore.ops.triton_linear import TRITON_KERNELS, TritonFp4Linear, TritonInt8Linear, TritonWeightLinear
from qcore.packing import Bits, CompressedPack
from qcore.plugins import load_registry
from qcore.testing import check_kernel

pytest.importorskip("triton")

HERE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = torch.device("cuda")
STATIC = QuantSpec(format=Int(8), granularity=PerTensor())


@pytest.fixture
def anywhere(monkeypatch):
    """The rule that a GPU is needed is left out: the interpreter runs on CPU."""
    monkeypatch.setattr(triton_linear, "_refuses_place", lambda job: None if job.unpack is not None else "the job does not say how it is unpacked")


def a_job(spec, n=48, k=128, **changes):
    unpack = partial(Bits().unpack, spec=spec, shape=(n, k))
    return replace(Job("linear", "bits", spec, (n, k), None, CUDA, torch.bfloat16, unpack), **changes)


@pytest.mark.parametrize(
    ("spec", "kernel"),
    [
        (int_weight(4, 64), TritonWeightLinear),
        (int_weight(8), TritonWeightLinear),
        (int_weight(3, 32, asymmetric=True), TritonWeightLinear),
        (mx(), TritonFp4Linear),
        (nvfp4(), TritonFp4Linear),
    ],
    ids=str,
)
def test_a_gpu_chooses_triton_for_float_inputs(spec, kernel):
    every = [k() for k in load_registry().kernels.values()]
    assert isinstance(choose(every, a_job(spec)).kernel, kernel)
    # float32 inputs would be rounded on the tensor cores
    assert choose(every, a_job(spec, dtype=torch.float32)).kernel.name == "reference-linear"
    here = choose(every, a_job(spec, device=torch.device("cpu")))
    assert here.kernel.name not in {k.name for k in TRITON_KERNELS}
    assert dict(here.refused)[kernel.name].startswith("runs on a GPU, got cpu")


@pytest.mark.parametrize("weight", [int_weight(4, 64), int_weight(8)], ids=str)
@pytest.mark.parametrize("activation", [int_activation(), STATIC], ids=str)
def test_a_gpu_chooses_int8_tensor_cores_for_int8_inputs(weight, activation):
    every = [k() for k in load_registry().kernels.values()]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert isinstance(choose(every, a_job(weight, activation=activation, dtype=dtype)).kernel, TritonInt8Linear)


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    [
        (TritonWeightLinear, {"device": torch.device("cpu")}, "runs on a GPU, got cpu"),
        (TritonWeightLinear, {"unpack": None}, "does not say how packing 'bits' is unpacked"),
        (TritonWeightLinear, {"activation": int_activation()}, "needs float inputs, got int8"),
        (TritonWeightLinear, {"dtype": torch.float32}, "needs float16 or bfloat16 inputs, got float32"),
        (TritonWeightLinear, {"weight": int_weight(4, 8)}, "needs groups of a multiple of 16 inputs, got 8"),
        (TritonWeightLinear, {"weight": nvfp4()}, "needs integers of 2 to 8 bits, got fp4-e2m1 per group 16"),
        (TritonInt8Linear, {}, "needs symmetric 8-bit inputs, got float inputs"),
        (TritonInt8Linear, {"activation": int_activation(), "weight": int_weight(4, 16)}, "needs groups of a multiple of 32 inputs, got 16"),
        (TritonInt8Linear, {"activation": replace(int_activation(), granularity=PerGroup(16))}, "needs dynamic scales per token"),
        (TritonInt8Linear, {"activation": replace(STATIC, granularity=PerChannel(1))}, "needs one static scale for all inputs"),
        (TritonFp4Linear, {}, "needs MXFP4 or NVFP4, got int4"),
        (TritonFp4Linear, {"weight": mx(FP8_E4M3)}, "needs MXFP4 or NVFP4, got fp8"),
    ],
)
def test_what_they_refuse_and_why(kernel, changes, reason):
    job = replace(a_job(int_weight(4, 32)), **changes)
    assert reason in kernel().refuses(job)


SPECS = [
    int_weight(4, 32),
    int_weight(4, 64, asymmetric=True, scale="bfloat16"),
    int_weight(8),
    int_weight(3, 16, scale="float32"),
    QuantSpec(format=Int(5, signed=False), granularity=PerGroup(32), offset=Offset.VALUE),
    QuantSpec(format=Int(4, signed=False), granularity=PerGroup(32), scale=QuantSpec(format=Int(6, signed=False), granularity=PerGroup(2))),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_integer_weights_keep_the_contract(spec, anywhere):
    # the weight, inputs of the dot product and the output are rounded to 8 and 11 bits
    check_kernel(TritonWeightLinear(), Bits(), spec, dtype=torch.bfloat16, rtol=2**-7, rows=(1, 17), shape=(33, 128), device=HERE)
    check_kernel(TritonWeightLinear(), Bits(), spec, dtype=torch.float16, rtol=2**-10, rows=(3,), device=HERE)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.granularity != PerGroup(16)], ids=str)
def test_int8_inputs_keep_the_contract(spec, anywhere):
    check_kernel(TritonInt8Linear(), Bits(), spec, activation=int_activation(), rtol=1e-5, rows=(1, 17), shape=(33, 128), device=HERE)


@pytest.mark.parametrize("spec", [mx(), nvfp4()], ids=str)
def test_fp4_keeps_the_contract(spec, anywhere):
    check_kernel(TritonFp4Linear(), Bits(), spec, dtype=torch.bfloat16, rtol=2**-7, rows=(1, 17), shape=(33, 128), device=HERE)


def test_static_inputs_use_the_stored_scale(anywhere):
    spec = int_weight(4, 32)
    job = a_job(spec, activation=STATIC, dtype=torch.float32, device=torch.device(HERE))
    kernel = TritonInt8Linear()
    parts = {**Bits().pack(quantize(torch.randn(48, 128, generator=torch.Generator().manual_seed(0)), spec)), "input.scale": torch.full((1, 1), 0.02)}
    x = torch.linspace(-3, 3, 256).reshape(2, 128).to(HERE)  # clips beyond 2.54
    parts = {name: t.to(HERE) for name, t in parts.items()}
    torch.testing.assert_close(kernel(x, kernel.prepare(parts, job), job), ReferenceLinear()(x, parts, job), rtol=1e-5, atol=1e-4)
    with pytest.raises(SpecError, match="static, but its scale was not given"):
        kernel.prepare({k: v for k, v in parts.items() if k != "input.scale"}, job)


def test_a_module_runs_it_strided_empty_with_gradients_and_on_bad_input(anywhere):
    q = quantize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)), int_weight(4, 32))
    every = [*(k() for k in KERNELS), *(k() for k in TRITON_KERNELS)]
    leaf = QuantizedLinear(CompressedPack().pack(q), q.spec, q.shape, CompressedPack()).to(HERE).bind(every, dtype=torch.float16)
    assert leaf.explain().kernel.name == "triton-weight-linear"
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1)).to(HERE, torch.float16).t()
    assert torch.equal(leaf(x), leaf(x.contiguous())) and leaf(x[:0]).shape == (0, 40) and leaf(x[None]).shape == (1, 3, 40)
    x = x.clone().requires_grad_()
    leaf(x).sum().backward()
    torch.testing.assert_close(x.grad, leaf.dequantize().half().sum(0).expand(3, 64), rtol=1e-2, atol=1e-2)
    with pytest.raises(SpecError, match=r"triton-weight-linear: x: has shape .* float32; allowed: .* float16, bfloat16"):
        leaf(torch.zeros(2, 64, device=HERE))
