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
        books = Codebook(fmt.bits, per_block=True, iterations=fmt.iterations) if isinstance(fmt, LowRankCodebook) else fmt
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
            _sort(run)
            stored = fmt.compress(lattice.params["codebook"])
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
    basis = eye if stored is None or "basis" not in stored else stored["basis"].to(run.w.dtype)
    for g in range(lattice.G):
        cols = slice(g * lattice.bc, min((g + 1) * lattice.bc, run.K))
        slope = run._flat(run.gram[:, cols] @ run._parts(run.error).transpose(0, 1))  # (W-Ŵ)·H, [m, N]
        codes = run.codes[cols.start // d : cols.stop // d].long()  # [m/d, N]
        # which number of the book each weight is: entry i of code c's d numbers stands at c·d + i
        place = (codes.unsqueeze(1) * d + torch.arange(d).view(1, d, 1)).flatten(0, 1)  # [m, N]
        z = torch.zeros(*place.T.shape, k, dtype=slope.dtype).scatter_(2, place.T.unsqueeze(-1), 1.0)  # [N, m, k]
        H = run.gram[:, cols, cols].repeat_interleave(run.N // run.P, 0) if run.P > 1 else run.gram[0, cols, cols]
        curve = _over_tiles(z.mT @ (H @ z), lattice)  # [R, k, k]
        fall = _over_tiles((z * slope.T.unsqueeze(-1)).sum(1), lattice)
        book = lattice.params["codebook"][:, g].flatten(1).to(slope.dtype)  # [R, k]
        # numbers that no weight uses stay where they are
        ridge = 1e-6 * curve.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(curve.dtype).tiny)
        curve = curve + eye * ridge[:, None, None]
        target = (curve @ book.unsqueeze(-1)).squeeze(-1) + fall
        inside = torch.linalg.solve(basis @ curve @ basis.T, (target @ basis.T).unsqueeze(-1)).squeeze(-1)  # [R, rank]
        if stored is not None:
            inside = (inside / stored["book_scale"]).round().clamp(-127, 127)
            stored["book"][:, g] = inside.to(torch.int8)
            inside = inside * stored["book_scale"].to(inside.dtype)
        new = (inside @ basis).float()
        moves = (new.to(slope.dtype) - book).repeat_interleave(lattice.br, 0)[: run.N]  # [N, k]
        run.error[cols] -= moves.T.gather(0, place)
        lattice.params["codebook"][:, g] = new.view(lattice.params["codebook"][:, g].shape)


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
