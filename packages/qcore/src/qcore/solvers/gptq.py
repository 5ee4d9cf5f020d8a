"""GPTQ: round one column at a time, and let the columns still unrounded absorb its error.

The paper inverts the damped Gram H, factors the inverse and updates all later columns after each one.  QuIP (theorem 6) showed that the same codes
come from H itself: factor H = R·D·Rᵀ with R unit upper triangular, and round column k at

    u_k = w_k + Σ_{j<k} (w_j - ŵ_j)·R[j, k]

where w are the original weights and ŵ what is stored.  This file works in that form: one Cholesky factorization and no inverse, so fewer roundings
and less work; and a residual that is exactly what the loss counts, tr((W-Ŵ) H (W-Ŵ)ᵀ) = Σ_k D_k·|u_k - ŵ_k|², so D_k is what an error in column k
costs when its scale is chosen.

The sum over j is organized by halves: solve the left half of a range of columns, add its errors to the right half in one matrix product, solve the
right half.  Nearly all work is then in a few large products, and the innermost steps touch 32 rows that stay in a core's cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcore.calibration.observer import Observer, Seen
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import Offset, QTensor, QuantSpec
from qcore.numbers.tensor import require_finite
from qcore.remarks import remark
from qcore.solvers.scales import Lattice, ScaleSearch, choose_all, per_row

_LEAF = 32  # columns of the innermost range, updated after every column
_SWEEP = 128  # columns of one product in a sweep
_LARGEST_DAMPING = 10.0


@dataclass(frozen=True, kw_only=True)
class GPTQ(ScaleSearch):
    """Round one column at a time, and let the columns still unrounded absorb its error.

    Source: https://arxiv.org/abs/2210.17323, algorithm 1; computed as in https://arxiv.org/abs/2307.13304, theorem 6; sweeps as in
    https://arxiv.org/abs/2309.01885 (QuantEase), with the scales in the descent.
    Differs: inputs that were never seen (H_jj = 0) are rounded to nearest; the paper's script sets their weights to zero, which destroys them for
    any other data.  No permutation is stored for `act_order`: scales are fixed beforehand, group by group of the original order.

    damp:          added to the Gram's diagonal, as a fraction of its mean; ten times as much whenever that has no Cholesky factor, with a warning
    act_order:     round columns in the order of falling diagonal: those that matter most find the least error to absorb; scales become static
    static_groups: choose all scales from the original weights; otherwise each group's from the weights as updated when its turn comes, as the paper
    weighted:      weigh each column's error by D_k when a scale is searched
    sweeps:        passes of coordinate descent afterwards: every scale by least squares, then every code, given all others; no change raises the loss

    Rows of the Gram are what the loss counts, and attention does not count alike: every later token reads the first position, whose keys and values a
    Gram of 512 tokens counts once.  Solved so, they come out up to 37 times further off than rounded to nearest (SmolLM2-135M), and the model worse
    than by weighted RTN although every layer's loss is halved.  Let calibration weigh the first position's rows up where q, k and v see them.
    """

    name: ClassVar[str] = "gptq"
    damp: float = 0.03
    act_order: bool = True
    static_groups: bool = False
    weighted: bool = True
    sweeps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp <= _LARGEST_DAMPING:
            raise SpecError(f"damping is a fraction of the mean diagonal, 0 to {_LARGEST_DAMPING:g}, got damp={self.damp}")
        if self.sweeps < 0:
            raise SpecError(f"sweeps is 0 or more, got {self.sweeps}")

    @property
    def observes(self) -> tuple[Observer, ...]:
        from qcore.calibration.observers import Gram

        return (Gram(),)

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen, frozen: Tensor | None = None) -> QTensor:
        """See `WeightSolver.solve`.  Computes in float64 if weight and Gram are float64, else in float32."""
        gram = _checked_gram(weight, seen)
        dtype = torch.float64 if weight.dtype == gram.dtype == torch.float64 else torch.float32
        require_finite(weight)
        N, K = weight.shape
        lattice = Lattice(spec, (N, K))
        if spec.format.shared:
            raise SpecError(f"GPTQ fits block by block, but {spec} has parts that all blocks share; use GPTVQ")
        d = spec.format.dim
        if lattice.bc % d and lattice.G > 1:
            raise SpecError(f"GPTQ rounds vectors of {d} inputs at once, so they must divide the {lattice.bc} inputs that share a scale; got {spec}")
        run = _Run(self, weight.detach().to(dtype), gram.to(dtype), lattice, None if frozen is None else frozen.to(dtype))
        run.round_columns()
        for _ in range(self.sweeps):
            run.sweep()
        return lattice.qtensor(run.codes.T.contiguous())


def _checked_gram(weight: Tensor, seen: Seen) -> Tensor:
    """The Gram as [P, K, K]; CalibrationError where it is missing, misshapen or not finite."""
    if "gram" not in seen:
        raise CalibrationError("GPTQ got no 'gram' of the inputs; calibrate this site, or round it to nearest with RTN()")
    gram = seen["gram"].detach()
    gram = gram.unsqueeze(0) if gram.ndim == 2 else gram
    N, K = weight.shape
    if gram.shape[1:] != (K, K) or N % gram.shape[0]:
        raise CalibrationError(
            f"a Gram of shape {tuple(gram.shape)} does not fit a weight [{N}, {K}]: need [{K}, {K}], or [P, {K}, {K}] with P dividing {N}"
        )
    if bad := int((~torch.isfinite(gram)).sum()):
        raise CalibrationError(
            f"{bad} of {gram.numel()} entries of the Gram are NaN or infinite: an activation overflowed in calibration; run it in float32 or bfloat16"
        )
    return gram


class _Run:
    """One weight being solved.  Arrays lie as [K, N], the rows of all P parts side by side; `_parts` shows them as [K, P, N/P].

    error: w - ŵ for the columns that are rounded, w for the others
    codes: [K / d, N]
    """

    codes: Tensor

    def __init__(self, options: GPTQ, w: Tensor, gram: Tensor, lattice: Lattice, frozen: Tensor | None) -> None:
        self.options, self.lattice = options, lattice
        self.d = lattice.spec.format.dim
        self.P = gram.shape[0]
        self.N, self.K = w.shape
        self.order = self._order(gram)
        self.w = w.T.contiguous()
        self.held = None if frozen is None else frozen.T.contiguous()
        self.gram, self.R, self.D = self._factor(gram)

    # the Gram ----------------------------------------------------------------------------------------------------------------------------
    def _order(self, gram: Tensor) -> Tensor | None:
        """Columns by falling diagonal, the columns of a vector together; None for the natural order.  [K]"""
        if not self.options.act_order:
            return None
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal = (diagonal / diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(gram.dtype).tiny)).sum(0)
        first = diagonal.view(-1, self.d).sum(1).argsort(descending=True, stable=True) * self.d
        return (first.unsqueeze(1) + torch.arange(self.d)).flatten()

    def _factor(self, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The damped Gram in original order, and R and D in processing order: H = R·diag(D)·Rᵀ.  [P, K, K], [P, K, K], [P, K]"""
        mean = gram.diagonal(dim1=1, dim2=2).mean(1)
        damp = self.options.damp
        while True:
            h = gram.clone()
            diagonal = h.diagonal(dim1=1, dim2=2)
            diagonal += damp * mean.unsqueeze(1)
            diagonal[diagonal == 0] = 1  # never seen, and no damping: any positive number rounds them to nearest
            ordered = h if self.order is None else h[:, self.order][:, :, self.order]
            # J H J = L Lᵀ with J the reversal gives H = (J L J)(J L J)ᵀ, and J L J is upper triangular
            lower, info = torch.linalg.cholesky_ex(ordered.flip(1, 2))
            upper = lower.flip(1, 2)
            root = upper.diagonal(dim1=1, dim2=2)
            if not info.any() and torch.isfinite(upper).all():
                break
            stronger = max(damp * 10, 1e-3)
            if stronger > _LARGEST_DAMPING:
                raise CalibrationError(
                    f"the Gram [{self.K}, {self.K}] has no Cholesky factor even with {damp:g} times its mean diagonal added: it is not a sum of "
                    "squares of inputs; check the observer, and that calibration activations are finite"
                )
            remark(f"the Gram [{self.K}, {self.K}] is not positive definite with damping {damp:g}; {stronger:g} was used. More calibration rows help")
            damp = stronger
        D = root.square()
        return h, upper.div_(root.clone().unsqueeze(1)), D

    # rounding ----------------------------------------------------------------------------------------------------------------------------

    def round_columns(self) -> None:
        """Codes, scales and errors of all columns: the paper's algorithm."""
        lattice, order = self.lattice, self.order
        self.heavy = self._importance()
        self.static = self.options.static_groups or order is not None
        if self.static:
            choose_all(self._free(slice(None), self.w), lattice, self.options, self.heavy)
        else:
            lattice.start(self._free(slice(None), self.w), self.heavy)
        self.place = list(range(self.K)) if order is None else order.tolist()  # where a column in processing order lies in the weight
        self.error = self.w.clone() if order is None else self.w[order]
        self.u = self.error.clone()
        self._solve(0, self.K)
        if order is not None:
            self.error = self.error[order.argsort()]
        del self.u, self.R

    def _importance(self) -> Tensor | None:
        """What an error of each entry costs when scales are chosen: D_k, and nothing where the entry is frozen.  [K, 1] or [K, N]"""
        heavy = None
        if self.options.weighted and (self.D[:, :1] != self.D).any():
            D = self.D / self.D.mean(1, keepdim=True)
            D = D if self.order is None else D[:, self.order.argsort()]
            heavy = per_row(D[0] if self.P == 1 else D, self.N)
        if self.held is None:
            return heavy
        free = self.held.isnan().to(self.w.dtype)
        return free if heavy is None else heavy * free

    def _free(self, columns: int | slice, x: Tensor) -> Tensor:
        """x with zeros for the frozen entries of these columns (of the weight's own order)."""
        return x if self.held is None else torch.where(self.held[columns].isnan(), x, 0.0)

    def _solve(self, a: int, b: int) -> None:
        """Round columns a … b; `u` there holds the weights with the errors of all columns before a absorbed."""
        width, bc = b - a, self.lattice.bc
        if width <= _LEAF:
            for k in range(a, b, self.d):
                if not self.static and k % bc == 0:
                    group = slice(k, min(k + bc, self.K))
                    heavy = None if self.heavy is None else self.heavy[group]
                    self.lattice.choose(k // bc, self._free(group, self._absorbed(group)), self.options, heavy)
                if k == 0:  # by now the format is fitted, and knows what its codes are
                    self.codes = torch.empty(self.K // self.d, self.N, dtype=self.lattice.code_dtype())
                (self._round_column if self.d == 1 else self._round_vector)(k, b)
            return
        # a group of columns is complete when its turn comes only if no split cuts it before
        unit = bc if width > bc and not self.static else self.d
        m = a + max(width // 2 // unit, 1) * unit
        self._solve(a, m)
        self._add_product(self.u[m:b], self.R[:, a:m, m:b].transpose(1, 2), self.error[a:m])
        self._solve(m, b)

    def _absorbed(self, columns: slice) -> Tensor:
        """What these columns would best be if they were not rounded: the paper's updated weights.  [m, N]

        `u` has the errors of the columns before them alone.  With those among themselves, (x - w)·R = u - w, R being the columns' own.
        """
        if columns.start == 0:
            return self.u[columns]
        w = self.error[columns]
        moved = self._parts(self.u[columns] - w).transpose(0, 1)
        return w + self._flat(torch.linalg.solve_triangular(self.R[:, columns, columns].mT, moved, upper=False, unitriangular=True))

    def _round_column(self, k: int, end: int) -> None:
        """Round column k, and let the columns up to `end` absorb its error."""
        at = self.place[k]
        x = self.u[k] if self.held is None else self._free(at, self.u[k])
        codes, value = self.lattice.quantize(x, at // self.lattice.bc)
        self.codes[at].copy_(codes)
        error = self.error[k].sub_(self._held(at, value))
        if k + 1 < end:
            self._parts(self.u[k + 1 : end]).addcmul_(self.R[:, k, k + 1 : end].T.unsqueeze(2), self._parts(error))

    def _round_vector(self, k: int, end: int) -> None:
        """Round columns k … k + d by one code: the best under what the loss says of these d columns together."""
        at, d = self.place[k], self.d
        cols, home = slice(k, k + d), slice(at, at + d)
        R = self.R[:, cols, cols]
        x = self._absorbed(cols)  # (u - ŵ, with the errors among the d columns) = (x - ŵ)·R
        D = self.D[:, cols]
        metric = R * (D / D.mean(1, keepdim=True)).sqrt().unsqueeze(1)
        value = self._choose_vector(home, x, metric)
        self.error[cols] -= value
        if k + d < end:
            self._add_product(self.u[k + d : end], self.R[:, cols, k + d : end].mT, self.error[cols])

    def _choose_vector(self, home: slice, x: Tensor, metric: Tensor) -> Tensor:
        """Store the code that minimizes |(x - value)·metric|² and return its values.  x: [d, N]; metric: [P, d, d] → [d, N]"""
        lattice, g = self.lattice, home.start // self.lattice.bc
        z = self._parts(lattice.normal(self._free(home, x), g).to(x.dtype)).transpose(0, 1)  # [P, d, n]
        table = lattice.table(g).to(x.dtype)  # [k, d] or [N, k, d]
        table = table.view(self.P, -1, *table.shape[1:]) if table.ndim == 3 else table.expand(self.P, 1, *table.shape)
        codes = _nearest_vectors(metric.mT @ z, table @ metric.unsqueeze(1)).flatten()
        codes = codes.to(self.codes.dtype)
        self.codes[home.start // self.d].copy_(codes)
        return self._held(home, lattice.values(codes.unsqueeze(0), g).to(x.dtype))

    def _held(self, columns: int | slice, value: Tensor) -> Tensor:
        """The values that will stand there: the frozen ones where there are any."""
        if self.held is None:
            return value
        return torch.where(self.held[columns].isnan(), value, self.held[columns])

    # sweeps ------------------------------------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """One pass of coordinate descent on tr((W-Ŵ) H (W-Ŵ)ᵀ) with the damped H: the scales of each group, then its codes, all others fixed."""
        bc, H = self.lattice.bc, self.gram
        step = max(_SWEEP // bc, 1) * bc
        for a in range(0, self.K, step):
            b = min(a + step, self.K)
            slope = self._flat(H[:, a:b] @ self._parts(self.error).transpose(0, 1))  # (W-Ŵ)·H of these columns, [b - a, N]
            for c in range(a, b, bc):
                group = slice(c, min(c + bc, b))
                before = self.error[group].clone()
                own = slope[group.start - a : group.stop - a]
                self._refit_scales(group, own)
                self._descend(group, own)
                if group.stop < b:
                    self._add_product(slope[group.stop - a :], H[:, group.stop : b, group], self.error[group] - before)

    def _refit_scales(self, group: slice, slope: Tensor) -> None:
        """The least-squares scale (and float offset) of each block given its codes, where what can be stored of it lowers the loss."""
        lattice = self.lattice
        if not lattice.spec.scaled:
            return
        g, H = group.start // lattice.bc, self.gram[:, group, group]
        codes = self.codes[group.start // self.d : group.stop // self.d]
        q = self._free(group, lattice.units(codes, g).to(slope.dtype))
        lattice.scale[g] += self._step(g, q, H, group, slope, lattice.scale[g], lattice.refit_scale)
        if lattice.offset is not None and lattice.spec.offset is Offset.VALUE:
            ones = self._free(group, torch.ones_like(q))
            lattice.offset[g] += self._step(g, ones, H, group, slope, lattice.offset[g], lattice.refit_offset)

    def _step(self, g: int, q: Tensor, H: Tensor, group: slice, slope: Tensor, now: Tensor, stored: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Move the factor of q in each block from `now` to what can be stored nearest its optimum; the loss is a parabola in it.  → the moves, [R]"""
        over = self.lattice.over_blocks
        Hq = self._flat(H @ self._parts(q).transpose(0, 1))
        curve, fall = over((q * Hq).sum(0)), over((q * slope).sum(0))
        best = now + torch.where(curve > 0, fall / torch.where(curve > 0, curve, 1.0), 0.0)
        move = stored(g, best.float()) - now
        move = torch.where((curve * move - 2 * fall) * move < 0, move, 0.0).float()
        rows = self.lattice.rows(move)
        self.error[group] -= rows * q
        slope -= rows * Hq
        return move

    def _descend(self, group: slice, slope: Tensor) -> None:
        """The best code of each column given all others.  slope: (W-Ŵ)·H of the group's columns, kept up to date"""
        H, d, g = self.gram, self.d, group.start // self.lattice.bc
        for a in range(group.start, group.stop, _LEAF // d * d or d):
            b = min(a + (_LEAF // d * d or d), group.stop)
            moved = torch.empty_like(self.error[a:b])
            for k in range(a, b, d):
                cols, at = slice(k, k + d), k - group.start
                value = self.w[cols] - self.error[cols]
                here = H[:, cols, cols]
                toward = self._parts(slope[at : at + d]).transpose(0, 1)
                if d == 1:
                    codes, new = self.lattice.quantize(self._free(cols, value + self._flat(toward / here)), g)
                    self.codes[cols].copy_(codes)
                    new = self._held(cols, new)
                else:
                    root = torch.linalg.cholesky(here)
                    new = self._choose_vector(cols, value + self._flat(torch.cholesky_solve(toward, root)), root / root[:, :1, :1])
                torch.sub(value, new, out=moved[k - a : k - a + d])
                self.error[cols] += moved[k - a : k - a + d]
                if k + d < b:
                    rest = slice(at + d, b - group.start)
                    self._add_product(slope[rest], H[:, k + d : b, cols], moved[k - a : k - a + d])
            if b < group.stop:
                self._add_product(slope[b - group.start :], H[:, b : group.stop, a:b], moved)

    # parts -------------------------------------------------------------------------------------------------------------------------------

    def _parts(self, x: Tensor) -> Tensor:
        """[..., N] → [..., P, N/P]"""
        return x.unflatten(-1, (self.P, -1))

    def _flat(self, x: Tensor) -> Tensor:
        """[P, m, n] → [m, N]"""
        return x[0] if self.P == 1 else x.transpose(0, 1).flatten(1)

    def _add_product(self, to: Tensor, matrix: Tensor, x: Tensor) -> None:
        """Add matrix·x to `to` in place, part by part.  to: [m, N]; matrix: [P, m, k]; x: [k, N]"""
        if self.P == 1:
            to.addmm_(matrix[0], x)
        else:
            self._parts(to).add_((matrix @ self._parts(x).transpose(0, 1)).transpose(0, 1))


def _nearest_vectors(x: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest vector.  x: [P, d, n]; table: [P, 1 or n, k, d] → [P, n]"""
    P, d, n = x.shape
    codes = torch.empty(P, n, dtype=torch.long)
    step = max((1 << 22) // (table.shape[2] * P), 1)
    for a in range(0, n, step):
        own = table if table.shape[1] == 1 else table[:, a : a + step]
        # the squares are not expanded, so that exact ties stay ties
        distance = (x[:, 0, a : a + step].unsqueeze(-1) - own[..., 0]).square_()
        for i in range(1, d):
            distance += (x[:, i, a : a + step].unsqueeze(-1) - own[..., i]).square_()
        codes[:, a : a + step] = torch.nan_to_num(distance, nan=torch.inf).argmin(-1)
    return codes
