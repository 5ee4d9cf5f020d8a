"""GPTVQ, and the codebooks that it stores in 8 bits over a shared basis."""

from itertools import pairwise

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers import Codebook, Int, LowRankCodebook, PerChannel, QTensor, QuantSpec, Tile, UnscaledTile, quantize, spec_from_dict, spec_to_dict
from qcore.packing import Bits
from qcore.plugins import Registry
from qcore.solvers import GPTQ, GPTVQ, RTN
from qcore.solvers.gptq import _Run
from qcore.solvers.gptvq import _refit
from qcore.solvers.scales import Lattice
from qcore.testing import check_format
from torch import Tensor

TILE = UnscaledTile(2, 32)
BOOKS = QuantSpec(format=Codebook(3, per_block=True), granularity=TILE)
STORED = QuantSpec(format=LowRankCodebook(3, rank=4), granularity=TILE)
SOLVER = GPTVQ()


def problem(n: int = 24, k: int = 96, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=g, dtype=dtype) @ torch.randn(k, k, generator=g, dtype=dtype) / k**0.5
    return torch.randn(n, k, generator=g, dtype=dtype) ** 3, x.T @ x


def loss(w: Tensor, q: QTensor, gram: Tensor) -> float:
    e = w - q.dequantize().to(w)
    return float(((e @ gram) * e).sum())


@pytest.mark.parametrize("fmt", [LowRankCodebook(3, rank=4), LowRankCodebook(2), LowRankCodebook(3, rank=8), LowRankCodebook(4, dim=2)], ids=str)
def test_low_rank_codebooks_keep_the_contract_of_formats(fmt):
    check_format(fmt)


def test_full_rank_books_are_those_of_k_means_up_to_8_bits():
    w, _ = problem()
    exact = quantize(w, QuantSpec(format=Codebook(3, per_block=True, iterations=100), granularity=TILE))
    stored = quantize(w, QuantSpec(format=LowRankCodebook(3), granularity=TILE))
    books = LowRankCodebook(3).books(stored.params())
    assert float((books - exact.parts["codebook"]).abs().max()) <= float(stored.parts["book_scale"]) / 2 + 1e-6


def test_every_tile_holds_at_most_eight_values():
    w, gram = problem()
    q = SOLVER.solve(w, STORED, {"gram": gram}).dequantize()
    for a in range(0, 24, 2):
        for b in range(0, 96, 32):
            assert q[a : a + 2, b : b + 32].unique().numel() <= 8


def test_bits_are_three_and_a_half():
    w, gram = problem(256, 512, dtype=torch.float32)
    stored = Bits().pack(GPTVQ(rounds=0).solve(w, STORED, {"gram": gram}))
    bits = 8 * sum(t.numel() * t.element_size() for t in stored.values()) / w.numel()
    basis = 32 * (4 + 4 * 8) / w.numel()  # the scales and the basis that all tiles share
    assert bits == pytest.approx(3 + 8 * 8 * 0.5 / 64 + basis, abs=1e-12)


def test_packed_and_unpacked_and_described_is_the_same_tensor():
    w, gram = problem()
    q = SOLVER.solve(w, STORED, {"gram": gram})
    back = Bits().unpack(Bits().pack(q), spec_from_dict(spec_to_dict(q.spec), Registry("").formats), q.shape)
    assert back.spec == q.spec and torch.equal(back.dequantize(), q.dequantize())


def test_tiles_at_the_edges_are_solved_too():
    w, gram = problem(7, 40)
    q = SOLVER.solve(w, STORED, {"gram": gram})
    assert q.dequantize().shape == w.shape
    assert loss(w, q, gram) < loss(w, quantize(w, STORED), gram)


@pytest.mark.parametrize("spec", [BOOKS, STORED], ids=["books", "8-bit books"])
def test_gptvq_beats_nearest_when_inputs_are_correlated(spec):
    ratios = []
    for seed in range(3):
        w, gram = problem(seed=seed)
        ratios.append(loss(w, SOLVER.solve(w, spec, {"gram": gram}), gram) / loss(w, quantize(w, spec), gram))
    assert max(ratios) < 0.8


@pytest.mark.parametrize("spec", [BOOKS, QuantSpec(format=Codebook(4, dim=2, per_block=True), granularity=Tile(8, 48), scale="float16")], ids=str)
def test_no_step_raises_the_loss(spec):
    w, gram = problem()
    lattice = Lattice(spec, tuple(w.shape))
    run = _Run(GPTQ(damp=0.01, act_order=False, static_groups=False, clip="none", sweeps=0), w, gram.unsqueeze(0), lattice, None)
    run.round_columns()

    def now() -> float:
        return float(((run.error.T @ run.gram[0]) * run.error.T).sum())

    losses = [now()]
    for _ in range(3):
        _refit(run)
        losses.append(now())
        run.sweep()
        losses.append(now())
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(losses)), losses  # books are float32
    assert losses[-1] < 0.9 * losses[0]
    q = lattice.qtensor(run.codes.T.contiguous())
    torch.testing.assert_close(run.error.T, w - q.dequantize(), rtol=1e-5, atol=1e-6)


def test_vectors_of_two_values_are_solved():
    spec = QuantSpec(format=Codebook(4, dim=2, per_block=True), granularity=UnscaledTile(8, 48))
    w, gram = problem()
    q = SOLVER.solve(w, spec, {"gram": gram})
    assert loss(w, q, gram) < loss(w, quantize(w, spec), gram)


@pytest.mark.parametrize(("bits", "dim", "rows"), [(2, 1, 2), (4, 2, 16), (6, 4, 24)])
def test_stored_books_of_vectors_are_solved_packed_and_counted(bits, dim, rows):
    """One scale and 2^bits vectors in 8 bits for each tile; the bits are those of the packed bytes."""
    spec = QuantSpec(format=LowRankCodebook(bits, dim=dim), granularity=Tile(rows, 96), scale="float16")
    w, gram = problem()
    q = SOLVER.solve(w, spec, {"gram": gram})
    assert loss(w, q, gram) < 0.9 * loss(w, quantize(w, spec), gram)
    packed = Bits().pack(q)
    assert torch.equal(Bits().unpack(packed, spec, q.shape).dequantize(), q.dequantize())
    tiles = -(-24 // rows)
    stored = 8 * sum(t.numel() * t.element_size() for t in packed.values())
    assert stored == 24 * 96 * bits / dim + tiles * (16 + (dim << bits) * 8) + 32  # 32: the one scale of all books


@pytest.mark.parametrize("spec", [BOOKS, QuantSpec(format=Codebook(4, dim=2, per_block=True), granularity=Tile(8, 48), scale="float16")], ids=str)
def test_sums_of_curvature_are_the_products_of_one_hot_rows(spec, monkeypatch):
    w, gram = problem()
    w[8:16] *= 10  # tiles of different scale
    losses = []
    for most in (0, 1000):
        monkeypatch.setattr("qcore.solvers.gptvq._ONE_HOT", most)
        losses.append(loss(w, SOLVER.solve(w, spec, {"gram": gram}), gram))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_vectors_have_no_basis():
    with pytest.raises(SpecError, match="no shared basis"):
        LowRankCodebook(4, rank=2, dim=2)


def test_exact_numbers_stay_exact():
    g = torch.Generator().manual_seed(0)
    w = torch.randint(0, 8, (4, 64), generator=g).double() - 4
    q = GPTVQ().solve(w, BOOKS, {"gram": problem(k=64)[1]})
    torch.testing.assert_close(q.dequantize().double(), w, rtol=0, atol=1e-5)


def test_what_gptvq_cannot_do_it_says():
    w, gram = problem()
    with pytest.raises(SpecError, match="codebook to every block"):
        SOLVER.solve(w, QuantSpec(format=Int(3), granularity=PerChannel(0)), {"gram": gram})
    with pytest.raises(SpecError, match="use GPTVQ"):
        GPTQ().solve(w, STORED, {"gram": gram})


def test_rtn_takes_shared_parts_as_they_are_fitted():
    w, _ = problem()
    assert torch.equal(RTN().solve(w, STORED, {}).dequantize(), quantize(w, STORED).dequantize())
