"""Kernels of one expert and of all: the slices that they share, and that the launch for all is each expert's own product."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers import Int, Offset, PerGroup, QuantSpec, int_activation, int_weight, quantize
from qcore.ops import Job, triton_linear
from qcore.ops.grouped_linear import GROUPED_KERNELS, GroupedParts, ReferenceGroupedLinear, TritonGroupedLinear
from qcore.packing import Bits
from qcore.testing import check_kernel

pytest.importorskip("triton")

HERE = "cuda" if torch.cuda.is_available() else "cpu"
SPECS = [
    int_weight(4, 32),
    int_weight(8),
    int_weight(3, 16, asymmetric=True, scale="float32"),
    QuantSpec(format=Int(5, signed=False), granularity=PerGroup(32), offset=Offset.VALUE),
]


@pytest.fixture
def anywhere(monkeypatch):
    """The rule that a GPU is needed is left out: the interpreter runs on CPU."""
    monkeypatch.setattr(triton_linear, "_refuses_place", lambda job: None if job.unpack is not None else "the job does not say how it is unpacked")


def a_job(spec, n=48, k=128, dtype=torch.bfloat16):
    return Job("linear", "bits", spec, (n, k), None, torch.device(HERE), dtype, partial(Bits().unpack, spec=spec, shape=(n, k)))


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_kernel_of_one_expert_keeps_the_contract(spec, anywhere):
    # the weight, inputs of the dot product and the output are rounded to 8 bits; the reference adds in float32
    check_kernel(TritonGroupedLinear(GroupedParts(3), 1), Bits(), spec, dtype=torch.bfloat16, rtol=2**-7, rows=(1, 17), shape=(33, 128), device=HERE)
    check_kernel(ReferenceGroupedLinear(GroupedParts(3), 1), Bits(), spec, rows=(1, 17), shape=(33, 128), device=HERE)


@pytest.mark.parametrize("kind", GROUPED_KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_all_at_once_is_each_by_its_own(spec, kind, anywhere):
    parts, job = GroupedParts(4), a_job(spec)
    kernels = [kind(parts, e) for e in range(4)]
    stored = [{name: t.to(HERE) for name, t in Bits().pack(quantize(some(48, 128, seed=e), spec)).items()} for e in range(4)]
    prepared = [kernel.prepare(p, job) for kernel, p in zip(kernels, stored, strict=True)]
    assert parts.complete
    # expert 2 has no rows, the last two rows have no expert
    x, ends = some(12, 128).to(HERE, torch.bfloat16), torch.tensor([3, 4, 4, 10], dtype=torch.int32, device=HERE)
    got = kernels[0].of_all(x, ends, job)
    each = [kernel(x[a:b], p, job) for kernel, p, a, b in zip(kernels, prepared, [0, 3, 4, 4], [3, 4, 4, 10], strict=True)]
    # sums of float32 in another order, rounded to bfloat16
    torch.testing.assert_close(got, torch.cat([*each, x.new_zeros(2, 48)]), rtol=2**-7, atol=2**-7)
    with pytest.raises(SpecError, match=rf"{kind.name}: (words|codes): has shape"):
        kernels[0].of_all(x[:2, :64], ends.clamp(max=2), job)


def test_they_refuse_as_the_kernel_of_a_layer_does(anywhere):
    parts, job = GroupedParts(2), a_job(int_weight(4, 32))
    assert all(kind(parts, 0).refuses(job) is None for kind in GROUPED_KERNELS)
    assert "float16 or bfloat16" in TritonGroupedLinear(parts, 0).refuses(replace(job, dtype=torch.float32))
    assert ReferenceGroupedLinear(parts, 0).refuses(replace(job, dtype=torch.float32)) is None
    assert "on meta" in ReferenceGroupedLinear(parts, 0).refuses(replace(job, device=torch.device("meta")))
    for kind in GROUPED_KERNELS:
        assert "needs float inputs, got int8" in kind(parts, 0).refuses(replace(job, activation=int_activation()))
        assert "needs groups of a multiple of 16 inputs, got 8" in kind(parts, 0).refuses(replace(job, weight=int_weight(4, 8)))


def test_parts_are_complete_when_all_have_put_theirs():
    parts = GroupedParts(3)
    assert not parts.complete and parts.nbytes == 0
    held = {}
    for e in (2, 0, 1):
        assert not parts.complete
        held[e] = parts.put(e, {"w": torch.full((2, 4), e, dtype=torch.int32), "s": torch.full((2,), float(e))})
    assert parts.complete and parts.nbytes == 3 * (8 * 4 + 2 * 4)
    assert torch.equal(parts.tensors()["w"][:, 0, 0], torch.tensor([0, 1, 2], dtype=torch.int32))
    # an expert's own are slices of the whole
    assert all(torch.equal(held[e]["w"], parts.tensors()["w"][e]) for e in range(3))
    assert held[1]["w"].data_ptr() == parts.tensors()["w"][1].data_ptr()
    held[1] = parts.put(1, {"w": torch.full((2, 4), 7, dtype=torch.int32), "s": torch.zeros(2)})
    assert parts.complete and int(parts.tensors()["w"][1, 0, 0]) == 7 and int(held[0]["w"][0, 0]) == 0
    # another dtype: begun anew, and not complete before all are there
    for e in range(3):
        held[e] = parts.put(e, {"w": torch.full((2, 4), e, dtype=torch.int32), "s": torch.zeros(2, dtype=torch.float16)})
        assert parts.complete == (e == 2)
    # nobody runs from them
    held.clear()
    assert not parts.complete and parts.tensors() == {} and parts.nbytes == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["deepcopy", "pickle"])
def test_a_copy_is_empty(copied):
    parts = GroupedParts(1)
    held = parts.put(0, {"w": torch.zeros(2)})
    other = copied(parts)
    assert parts.complete and held and other.experts == 1 and not other.complete and other.tensors() == {}
