"""HQQ: every block is at least as good as what it started from, by its own measure; frozen and exact numbers stay."""

from dataclasses import replace

import pytest
import torch
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import Codebook, Int, Offset, PerGroup, PerTensor, QuantSpec, Tile, int_weight, mx
from qcore.solvers import HQQ, RTN
from qcore.solvers.hqq import shrink
from qcore.testing import check_solver

OFFSET = QuantSpec(format=Int(2), granularity=PerGroup(32), offset=Offset.VALUE, scale="float16")
SPECS = {
    "offset": OFFSET,
    "symmetric": int_weight(3, 32),
    "zero-point": int_weight(2, 32, asymmetric=True),
    "tensor": QuantSpec(format=Int(4), granularity=PerTensor()),
    "ragged-tiles": QuantSpec(format=Int(3), granularity=Tile(5, 40)),
    "mx": mx(),
}


def heavy_tailed(n: int = 16, k: int = 96, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) ** 3


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_hqq_keeps_the_contract_of_solvers(spec):
    check_solver(HQQ(), spec)


@pytest.mark.parametrize("name", ["offset", "symmetric", "zero-point", "ragged-tiles"])
def test_no_block_is_worse_than_its_start(name):
    w, spec = heavy_tailed(), SPECS[name]
    start = RTN(clip="none").solve(w, spec, {}).dequantize()
    found = HQQ(power=0.7).solve(w, spec, {}).dequantize()
    rows, cols = spec.granularity.block(tuple(w.shape))
    before, after = ((w - v).abs().pow(0.7) for v in (start, found))
    for a in range(0, 16, rows):
        for b in range(0, 96, cols):
            block = (slice(a, a + rows), slice(b, b + cols))
            assert float(after[block].sum()) <= float(before[block].sum()) * (1 + 1e-5)
    assert float(after.sum()) < 0.97 * float(before.sum())


def test_a_scaled_weight_is_solved_alike():
    """The shrinkage is in steps of the block, not in units of the weights."""
    w, spec = heavy_tailed(), replace(OFFSET, scale="float32")
    small, large = (HQQ().solve(w * f, spec, {}) for f in (2.0**-10, 1.0))
    assert torch.equal(small.codes, large.codes)


def test_shrinking_drops_small_errors_and_keeps_signs():
    x = torch.tensor([-0.9, -0.1, 0.0, 0.1, 0.9])
    y = shrink(x, beta=10.0, power=0.7)
    assert (y[1:4] == 0).all() and float(y[4]) == pytest.approx(0.9 - 0.9**-0.3 / 10) and float(y[0]) == -float(y[4])


def test_weighted_hqq_wants_its_gram():
    w = heavy_tailed()
    with pytest.raises(CalibrationError, match="no 'gram'"):
        HQQ(weighted=True).solve(w, OFFSET, {})
    importance = torch.rand(96) ** 4
    error = [((w - HQQ(weighted=f).solve(w, OFFSET, {"gram": importance.diag()}).dequantize()).abs().pow(0.7) * importance).sum() for f in (0, 1)]
    assert error[1] < error[0]


def test_codebooks_are_not_hqqs():
    with pytest.raises(SpecError, match="fixed beforehand"):
        HQQ().solve(heavy_tailed(), QuantSpec(format=Codebook(2), granularity=PerGroup(32)), {})
