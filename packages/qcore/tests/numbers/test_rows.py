"""Pieces of a matrix: joined, cut, and when that is allowed."""

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers import Codebook, Int, PerChannel, PerGroup, PerTensor, QuantSpec, Tile, int_weight, mx, nvfp4, quantize
from qcore.numbers.tensor import concat_rows, rows_are_apart, split_rows

APART = [
    int_weight(4, 16),
    int_weight(4, 16, asymmetric=True),
    int_weight(3),
    mx(),
    QuantSpec(format=Codebook(3, per_block=True), granularity=PerGroup(32)),
    QuantSpec(format=Codebook(4, dim=2, per_block=True), granularity=Tile(1, 32)),
]
SHARED = [
    nvfp4(),
    QuantSpec(format=Int(4), granularity=PerTensor()),
    QuantSpec(format=Int(4), granularity=PerChannel(1)),
    QuantSpec(format=Int(4), granularity=Tile(8, 8)),
    QuantSpec(format=Codebook(3), granularity=PerGroup(32)),
]


@pytest.mark.parametrize("spec", APART, ids=str)
def test_rows_that_are_apart_are_quantized_together_as_one_by_one(spec):
    assert rows_are_apart(spec)
    torch.manual_seed(0)
    pieces = [torch.randn(n, 64) for n in (3, 8, 1)]
    whole = quantize(torch.cat(pieces), spec)
    apart = [quantize(p, spec) for p in pieces]
    for cut, own in zip(split_rows(whole, [3, 8, 1]), apart, strict=True):
        assert cut.shape == own.shape and all(torch.equal(cut.parts[k], own.parts[k]) for k in own.parts)
    joined = concat_rows(apart)
    assert joined.shape == whole.shape and all(torch.equal(joined.parts[k], whole.parts[k]) for k in whole.parts)


@pytest.mark.parametrize("spec", SHARED, ids=str)
def test_rows_that_share_numbers_are_not_joined(spec):
    assert not rows_are_apart(spec)
    pieces = [quantize(torch.randn(5, 64), spec) for _ in range(2)]
    with pytest.raises(SpecError, match="channel"):
        concat_rows(pieces)
