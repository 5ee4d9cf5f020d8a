"""Fitted codebooks: k-means laws, vectors, one book per block."""

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers import Codebook, PerGroup, PerTensor, QuantSpec, Tile, fake_quantize, quantize
from qcore.numbers.granularity import to_blocks
from qcore.numbers.kmeans import kmeans
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss(points: Tensor, centers: Tensor, weight: Tensor | None = None) -> Tensor:
    """Σ w (x - nearest c)² of each problem, in float64.  [B, n, d], [B, k, d] → [B]"""
    w = torch.ones_like(points) if weight is None else weight
    error = (points.double().unsqueeze(2) - centers.double().unsqueeze(1)).square() * w.double().unsqueeze(2)
    return error.sum(-1).amin(-1).sum(-1)


@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_weighted_loss_never_rises(d, weighted):
    points = randn(3, 60, d) ** 3
    weight = randn(3, 60, d, seed=1).abs() if weighted else None
    losses = torch.stack([loss(points, kmeans(points, 8, weight, iterations=i), weight) for i in range(12)])
    assert (losses.diff(dim=0) <= losses[0] * 1e-6).all()  # centres are float32
    assert (losses[-1] < losses[0]).all()


@pytest.mark.parametrize("d", [1, 2, 4])
def test_equal_weights_are_no_weights(d):
    points = randn(2, 50, d)
    torch.testing.assert_close(kmeans(points, 4, torch.full_like(points, 2.0)), kmeans(points, 4))


@pytest.mark.parametrize("d", [1, 2])
def test_points_of_weight_zero_are_not_there(d):
    points, noise = randn(2, 40, d), torch.zeros(2, 25, d)
    weight = randn(2, 40, d, seed=1).abs() + 0.1
    both = kmeans(torch.cat([noise, points], 1), 8, torch.cat([torch.zeros_like(noise), weight], 1))
    torch.testing.assert_close(both, kmeans(points, 8, weight))


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("counts", [[50, 1, 1], [20, 20, 20, 1], [5], [1, 1]], ids=str)
def test_no_more_distinct_points_than_centres_are_kept_exactly(d, counts):
    distinct = torch.linspace(-1, 3, len(counts)).unsqueeze(-1) * torch.tensor([1.0, -2.0])[:d]
    points = distinct.repeat_interleave(torch.tensor(counts), dim=0).unsqueeze(0)
    centers = kmeans(points, 4)
    assert centers.shape == (1, 4, d)
    assert loss(points, centers).item() == pytest.approx(0, abs=1e-10)  # float32 means of up to 50 equal numbers, squared


def test_problems_do_not_see_each_other():
    points = randn(3, 30, 1) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
    together = kmeans(points, 4)
    for b in range(3):
        assert torch.equal(together[b], kmeans(points[b : b + 1], 4)[0])


def test_a_book_of_numbers_is_sorted():
    book = kmeans(randn(4, 100, 1), 16).squeeze(-1)
    assert (book.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("granularity", [PerTensor(), PerGroup(12), Tile(4, 8)], ids=str)
def test_every_value_gets_the_nearest_entry_of_its_book(dim, per_block, granularity):
    spec = QuantSpec(format=Codebook(3, dim=dim, per_block=per_block), granularity=granularity)
    x = randn(7, 36)
    q = quantize(x, spec)
    book = q.parts["codebook"]
    blocks = torch.Size(-(-n // b) for n, b in zip(x.shape, q.block, strict=True))
    assert book.shape == (*(blocks if per_block else ()), 8, *((dim,) if dim > 1 else ()))
    assert q.codes.shape == (7, 36 // dim)

    # by brute force, block by block
    entries = book.reshape(*(book.shape[:-1] if dim == 1 else book.shape[:-2]), 8, dim)
    z = to_blocks(x, q.block) / q.scale().unsqueeze(-1)
    near = to_blocks(q.dequantize(), q.block) / q.scale().unsqueeze(-1)
    vectors, got = z.unflatten(-1, (-1, dim)), near.unflatten(-1, (-1, dim))
    entries = entries.unsqueeze(-3) if per_block else entries
    best = (vectors.unsqueeze(-2) - entries).square().sum(-1).amin(-1)
    inside = to_blocks(torch.ones_like(x), q.block).unflatten(-1, (-1, dim))[..., 0] > 0
    torch.testing.assert_close((vectors - got).square().sum(-1)[inside], best[inside], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_filled_up_edges_of_tiles_do_not_distort_their_books(dim):
    fmt = Codebook(2, dim=dim, per_block=True)
    x = randn(6, 12) + 3
    # the second row of tiles has 2 of 4 rows
    ragged = quantize(x, QuantSpec(format=fmt, granularity=Tile(4, 12)))
    alone = quantize(x[4:], QuantSpec(format=fmt, granularity=Tile(2, 12)))
    torch.testing.assert_close(ragged.parts["codebook"][1, 0], alone.parts["codebook"][0, 0])


def test_importance_moves_the_book():
    x = torch.linspace(0, 1, 100).unsqueeze(0)
    spec = QuantSpec(format=Codebook(3), granularity=PerTensor())
    heavy = torch.where(x < 0.3, 100.0, 0.01)
    error = {}
    for name, weight in {"weighted": heavy, "unweighted": None}.items():
        e = (quantize(x, spec, weight=weight).dequantize() - x).square()
        error[name] = float((e * heavy).sum())
    assert error["weighted"] < error["unweighted"]


def test_a_codebook_without_its_book_is_refused():
    with pytest.raises(SpecError, match="needs its fitted part 'codebook'"):
        Codebook(4).decode(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize(("bits", "dim"), [(0, 1), (16, 1), (4, 0)])
def test_impossible_codebooks_are_refused(bits, dim):
    with pytest.raises(SpecError, match="1 to 15 bits"):
        Codebook(bits, dim)


@pytest.mark.parametrize(
    ("shape", "granularity", "per_block", "message"),
    [((4, 9), PerTensor(), False, "vectors of 2 values do not divide K=9"), ((4, 12), PerGroup(3), True, "do not divide a block")],
    ids=str,
)
def test_vectors_that_do_not_fit_are_refused(shape, granularity, per_block, message):
    with pytest.raises(SpecError, match=message):
        fake_quantize(randn(*shape), QuantSpec(format=Codebook(2, dim=2, per_block=per_block), granularity=granularity))
