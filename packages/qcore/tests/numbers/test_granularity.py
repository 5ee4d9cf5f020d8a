"""Blocks: cutting a tensor up and putting it together."""

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Tile, Unscaled, fake_quantize
from qcore.numbers.formats import Int
from qcore.numbers.granularity import block_range, from_blocks, grid, repeat_blocks, spread, to_blocks

CASES = [
    ((7, 130), PerTensor()),
    ((7, 130), PerChannel(0)),
    ((7, 130), PerChannel(-1)),
    ((2, 7, 130), PerToken()),
    ((2, 7, 130), PerGroup(13)),
    ((7, 130), Tile(4, 64)),
    ((3, 7, 13), Tile(16, 5)),
    ((130,), PerGroup(10)),
]


@pytest.mark.parametrize(("shape", "granularity"), CASES, ids=str)
def test_blocks_put_together_are_the_tensor(shape, granularity):
    x = torch.arange(torch.Size(shape).numel()).float().reshape(shape)
    block = granularity.block(shape)
    blocks = to_blocks(x, block)
    assert blocks.shape[:-1] == grid(shape, block)
    assert torch.equal(from_blocks(blocks, block, shape), x)


@pytest.mark.parametrize(("shape", "granularity"), CASES, ids=str)
def test_spreading_gives_each_value_its_own_block(shape, granularity):
    block = granularity.block(shape)
    g = grid(shape, block)
    numbers = torch.arange(torch.Size(g).numel()).reshape(g)
    expected = from_blocks(numbers.unsqueeze(-1).expand(*g, torch.Size(block).numel()), block, shape)
    assert torch.equal(spread(numbers, block, shape).expand(shape), expected)
    assert torch.equal(repeat_blocks(numbers.unsqueeze(-1), block, shape).squeeze(-1), expected)


@pytest.mark.parametrize(("shape", "granularity"), CASES, ids=str)
def test_ranges_hold_their_block_and_zero(shape, granularity):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1
    block = granularity.block(shape)
    low, high = block_range(x, block)
    assert (spread(low, block, shape) <= x).all()
    assert (x <= spread(high, block, shape)).all()
    assert (low <= 0).all()
    assert (high >= 0).all()


def test_a_scale_without_leading_axes_serves_any_rank():
    assert spread(torch.tensor([2.0]), (3, 4), (3, 4)).expand(3, 4).eq(2).all()
    assert torch.equal(spread(torch.tensor([1.0, 2.0]), (5, 3, 1), (5, 3, 2)).expand(5, 3, 2)[4, 1], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(-1), PerToken(), PerGroup(4), Tile(2, 2), Unscaled()], ids=str)
def test_no_rows_stay_no_rows(granularity):
    spec = QuantSpec(format=Int(4), granularity=granularity)
    assert fake_quantize(torch.empty(0, 8), spec).shape == (0, 8)
    assert fake_quantize(torch.empty(2, 0, 8), spec).shape == (2, 0, 8)


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (PerGroup(64), (4, 130), "group size 64 does not divide K=130; use granularity 'channel', or a divisor of 130: 10, 13, 26, 65"),
        (PerChannel(2), (4, 4), "channel axis 2 does not exist"),
        (Tile(4, 4), (16,), "two axes or more"),
    ],
    ids=str,
)
def test_blocks_that_do_not_fit_are_refused_with_the_next_step(granularity, shape, message):
    with pytest.raises(SpecError, match=message):
        granularity.block(shape)


@pytest.mark.parametrize("make", [lambda: PerGroup(0), lambda: Tile(0, 4), lambda: Tile(4, -1)])
def test_blocks_hold_a_value_at_least(make):
    with pytest.raises(SpecError, match="at least"):
        make()
