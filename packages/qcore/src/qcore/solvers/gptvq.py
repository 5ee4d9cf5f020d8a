"""GPTVQ: GPTQ with a codebook for every tile of the weight.

Columns are rounded one vector at a time, and the columns still unrounded absorb the error, exactly as in GPTQ; what is new is where the numbers come
from: when a group of columns has its turn, every tile of it (a few rows × the group's columns) gets a codebook by weighted k-means on the weights as
updated so far.  Afterwards codebooks are improved for the codes that were chosen, then stored in 8 bits, perhaps over a shared basis, and codes are
chosen once more from what is stored.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.numbers import Codebook, QTensor, QuantSpec
from qcore.numbers.formats import LowRankCodebook
from qcore.numbers.tensor import require_finite
from qcore.solvers.gptq import GPTQ, _checked_gram, _Run
from qcore.solvers.scales import Lattice

_ONE_HOT = 64  # numbers of a book up to which a product with one-hot rows is faster than adding them up


@dataclass(frozen=True, kw_only=True)
class GPTVQ:
    """GPTQ for per-block codebooks: `Codebook(per_block=True)`, or `LowRankCodebook`, whose books are stored in 8 bits.

    Source: https://arxiv.org/abs/2402.15319, algorithm 1 and section 3.3.
    Differs: the update of codebooks after rounding is least squares group by group of columns, exact and without a step size, where the released code
    takes 25 Adam steps on all of them at once; and codes are chosen once more afterwards, so that none was chosen from a book that is not stored.

    damp:   as GPTQ's
    rounds: of least squares for the codebooks and descent for the codes, before the codebooks are coded; the loss never rises
    """

    name: ClassVar[str] = "gptvq"
    damp: float = 0.01
    rounds: int = 2

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise SpecError(f"rounds is 0 or more, got {self.rounds}")

    @property
    def observes(self) -> tuple[Observer, ...]:
        from qcore.calibration.observers import Gram

        return (Gram(),)

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen, frozen: Tensor | None = None) -> QTensor:
        """See `WeightSolver.solve`."""
        fmt = spec.format
        if not isinstance(fmt, Codebook | LowRankCodebook) or not fmt.per_block:
            raise SpecError(f"GPTVQ fits a codebook to every block, got {spec}; use Codebook(per_block=True) or LowRankCodebook, or GPTQ")
        if frozen is not None:
            raise SpecError("GPTVQ keeps no entries frozen; leave out the transform that splits this weight, or use GPTQ")
        gram = _checked_gram(weight, seen)
        require_finite(weight)
        books = Codebook(fmt.bits, fmt.dim, per_block=True, iterations=fmt.iterations) if isinstance(fmt, LowRankCodebook) else fmt
        lattice = Lattice(replace(spec, format=books), tuple(weight.shape))
        options = GPTQ(damp=self.damp, act_order=False, static_groups=False, clip="none", sweeps=0)
        dtype = torch.float64 if weight.dtype == gram.dtype == torch.float64 else torch.float32
        run = _Run(options, weight.detach().to(dtype), gram.to(dtype), lattice, None)
        run.round_columns()
        for _ in range(self.rounds):
            _refit(run)
            run.sweep()
        parts = lattice.parts()
        if isinstance(fmt, LowRankCodebook):
            if fmt.dim == 1:
                _sort(run)
            books_now = lattice.params["codebook"]
            stored = fmt.compress(books_now if fmt.dim == 1 else books_now.flatten(-2))
            for _ in range(max(self.rounds, 1)):
                _refit(run, stored)
                run.sweep()
            parts = {name: p for name, p in parts.items() if name != "codebook"} | stored
        return QTensor(spec, {"codes": run.codes.T.contiguous(), **parts}, lattice.shape)


def _refit(run: _Run, stored: dict[str, Tensor] | None = None) -> None:
    """The least-squares codebooks of each group of columns given all codes, in turn: tr((W-Ŵ) H (W-Ŵ)ᵀ) never rises.

    stored: the parts of a LowRankCodebook; then books are fitted within its basis, and the factors that it keeps are put there in place
    """
    lattice, d = run.lattice, run.d
    k = d << lattice.spec.format.bits
    eye = torch.eye(k, dtype=run.w.dtype)
    basis = None if stored is None or "basis" not in stored else stored["basis"].to(run.w.dtype)
    for g in range(lattice.G):
        cols = slice(g * lattice.bc, min((g + 1) * lattice.bc, run.K))
        slope = run._flat(run.gram[:, cols] @ run._parts(run.error).transpose(0, 1))  # (W-Ŵ)·H, [m, N]
        codes = run.codes[cols.start // d : cols.stop // d].long()  # [m/d, N]
        # which number of the book each weight is: entry i of code c's d numbers stands at c·d + i
        place = (codes.unsqueeze(1) * d + torch.arange(d).view(1, d, 1)).flatten(0, 1)  # [m, N]
        scale = lattice.rows(lattice.scale[g]).to(slope.dtype)  # [N]; 1 where the spec has none
        curve = _curvature(run, cols, place, scale, k)  # [R, k, k]
        falls = torch.zeros(run.N, k, dtype=slope.dtype).scatter_add_(1, place.T, slope.T * scale.unsqueeze(1))
        fall = _over_tiles(falls, lattice)  # [R, k]
        book = lattice.params["codebook"][:, g].flatten(1).to(slope.dtype)  # [R, k]
        # numbers that no weight uses stay where they are
        ridge = 1e-6 * curve.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(curve.dtype).tiny)
        curve = curve + eye * ridge[:, None, None]
        target = (curve @ book.unsqueeze(-1)).squeeze(-1) + fall
        if basis is not None:
            inside = torch.linalg.solve(basis @ curve @ basis.T, (target @ basis.T).unsqueeze(-1)).squeeze(-1)  # [R, rank]
        else:
            inside = torch.linalg.solve(curve, target.unsqueeze(-1)).squeeze(-1)
        if stored is not None:
            inside = (inside / stored["book_scale"]).round().clamp(-127, 127)
            stored["book"][:, g] = inside.to(torch.int8)
            inside = inside * stored["book_scale"].to(inside.dtype)
        new = (inside if basis is None else inside @ basis).float()
        moves = (new.to(slope.dtype) - book).repeat_interleave(lattice.br, 0)[: run.N]  # [N, k]
        run.error[cols] -= moves.T.gather(0, place) * scale
        lattice.params["codebook"][:, g] = new.view(lattice.params["codebook"][:, g].shape)


def _curvature(run: _Run, cols: slice, place: Tensor, scale: Tensor, k: int) -> Tensor:
    """Σ over the rows of each tile of s²·ZᵀHZ, Z [m, k] being one-hot: which number of the book each weight of the row is.  [R, k, k]

    place: [m, N]; scale: [N]
    """
    lattice, m = run.lattice, place.shape[0]
    square = scale.square()
    if k <= _ONE_HOT:
        z = torch.zeros(*place.T.shape, k, dtype=scale.dtype).scatter_(2, place.T.unsqueeze(-1), 1.0)  # [N, m, k]
        H = run.gram[:, cols, cols].repeat_interleave(run.N // run.P, 0) if run.P > 1 else run.gram[0, cols, cols]
        return _over_tiles(z.mT @ (H @ z) * square[:, None, None], lattice)
    curve = torch.zeros(lattice.R, k * k, dtype=scale.dtype)
    for n in range(run.N):
        H = run.gram[n * run.P // run.N, cols, cols] * square[n]
        own = place[:, n]
        curve[n // lattice.br].scatter_add_(0, (own.unsqueeze(1) * k + own).flatten(), H.reshape(m * m))
    return curve.view(lattice.R, k, k)


def _over_tiles(per_row: Tensor, lattice: Lattice) -> Tensor:
    """Sums over the rows of each tile.  [N, …] → [R, …]"""
    short = lattice.R * lattice.br - per_row.shape[0]
    if short:
        per_row = torch.cat([per_row, per_row.new_zeros(short, *per_row.shape[1:])])
    return per_row.unflatten(0, (lattice.R, lattice.br)).sum(1)


def _sort(run: _Run) -> None:
    """Put the numbers of each book in order, and renumber the codes in place."""
    lattice = run.lattice
    books, order = lattice.params["codebook"].sort(-1)  # [R, G, k]
    rank = order.argsort(-1)
    lattice.params["codebook"] = books
    for g in range(lattice.G):
        cols = slice(g * lattice.bc, min((g + 1) * lattice.bc, run.K))
        own = rank[:, g].repeat_interleave(lattice.br, 0)[: run.N].T  # [k, N]
        run.codes[cols] = own.gather(0, run.codes[cols].long()).to(run.codes.dtype)
