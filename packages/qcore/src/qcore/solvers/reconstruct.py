"""Learned rounding: codes and scales of a whole block are moved until the block puts out what the float block did.

    each step:  weights = values of (codes + what is learned)  →  the block's outputs  →  squared error against the float block's  →  a step

All start from the codes that the weight solvers found, and the result is measured as it will be stored, over all calibration batches: where it is no
better than the start, the start stays.  So no block gets worse on the calibration data; what that is worth on other data is for evidence to tell.

| class | name | what is learned | how |
|---|---|---|---|
| SignRound | "signround" | a shift of each weight by up to half a step, a factor of each scale | the sign of the gradient, straight through |
| AdaRound | "adaround" | up or down for each weight | Adam on a sigmoid that is pressed to 0 or 1 |
| LearnedClipping | "lwc" | the range of each block of weights | Adam, straight through; every weight goes to the nearest |
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcore.errors import SpecError
from qcore.model.topology import Site
from qcore.numbers import Int, Offset, QTensor, QuantSpec
from qcore.numbers.granularity import spread
from qcore.numbers.tensor import normalize, store_scale
from qcore.solvers.base import BlockSolver, BlockView


class Grid:
    """The evenly spaced numbers of one weight [N, K], as torch can differentiate them.

    codes: [N, K] float, those of the start
    z:     [N, K] the weights in steps of the grid, zero point added; moved so near to the start's codes that each rounds to its own
    """

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        self.start, self.spec, self.shape, self.block = start, start.spec, start.shape, start.block
        self.scale = start.scale()
        self.offset = start.parts["offset"].float() if "offset" in start.parts else None
        self.codes = start.codes.float()
        self.raw = normalize(weight.detach().float(), self.spec, start.parts)
        self.z = torch.minimum(torch.maximum(self.raw, self.codes - 0.499), self.codes + 0.499)

    def rounded(self, z: Tensor) -> Tensor:
        """The nearest codes; gradients pass straight through, but not beyond the last code."""
        inside = z.clamp(self.spec.format.lo, self.spec.format.hi)
        return inside + (inside.round() - inside).detach()

    def values(self, codes: Tensor, factor: Tensor | None = None) -> Tensor:
        """What float codes stand for.  factor: of each scale, [g0, g1]"""
        scale = self.scale if factor is None else self.scale * factor
        if self.offset is not None and self.spec.offset is Offset.CODE:
            codes = codes - spread(self.offset, self.block, self.shape)
        values = codes * spread(scale, self.block, self.shape)
        if self.offset is not None and self.spec.offset is Offset.VALUE:
            values = values + spread(self.offset, self.block, self.shape)
        return values

    def stored(self, codes: Tensor, factor: Tensor | None = None) -> QTensor:
        """The record of these codes, scales as the spec stores them."""
        parts = dict(self.start.parts) | {"codes": codes.detach().round().to(self.start.codes.dtype)}
        if factor is not None:
            parts |= store_scale((self.scale * factor).detach(), self.spec)
        return QTensor(self.spec, parts, self.shape)


@dataclass(frozen=True, kw_only=True)
class Reconstruction(BlockSolver):
    """What the learned roundings share: the loop.

    steps: of the optimizer; each sees one calibration batch, and those of single tokens (sequence starts) besides
    lr:    its step size, falling linearly to zero
    seed:  of the order of batches
    target: as `BlockSolver.target`
    """

    steps: int = 200
    lr: float = 0.01
    seed: int = 0
    target: Literal["float", "same"] = "float"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0:
            raise SpecError(f"learning wants at least one step and a positive lr, got steps={self.steps}, lr={self.lr}")
        if self.target not in ("float", "same"):
            raise SpecError(f"target is float or same, got {self.target!r}")

    def refuses(self, spec: QuantSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, Int) or (fmt.signed and fmt.bits == 1) or not spec.scaled:
            return f"{self.name} moves codes by one step of an even grid, and {spec} has none"
        return None

    # what subclasses say -----------------------------------------------------------------------------------------------------------------

    def learned(self, grid: Grid) -> list[Tensor]:
        """The parameters of one weight, at the start's values."""
        raise NotImplementedError

    def codes(self, grid: Grid, learned: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Float codes and factors of the scales, for a step."""
        raise NotImplementedError

    def final(self, grid: Grid, learned: list[Tensor]) -> QTensor:
        """What is stored."""
        with torch.no_grad():
            return grid.stored(*self.codes(grid, learned))

    def penalty(self, grid: Grid, learned: list[Tensor], done: float) -> Tensor | float:
        """Added to the loss, which is 1 at the start.  done: share of the steps that are done"""
        return 0.0

    def step(self, parameters: list[Tensor], gradients: list[Tensor], state: list[dict[str, Tensor]], lr: float, count: int) -> None:
        """Adam; `count` steps were made before."""
        for p, g, s in zip(parameters, gradients, state, strict=True):
            m, v = s.setdefault("m", torch.zeros_like(p)), s.setdefault("v", torch.zeros_like(p))
            m.lerp_(g, 0.1)
            v.lerp_(g.square(), 0.001)
            p -= lr * (m / (1 - 0.9 ** (count + 1))) / ((v / (1 - 0.999 ** (count + 1))).sqrt() + 1e-12)

    # the loop ----------------------------------------------------------------------------------------------------------------------------

    def solve_block(self, view: BlockView) -> Mapping[Site, QTensor]:
        """See `BlockSolver.solve_block`."""
        start = {site: q for site, q in view.start.items() if self.refuses(q.spec) is None}
        if not start:
            return {}
        kept = {site: q.dequantize() for site, q in view.start.items() if site not in start}
        before = _error(view, kept | {site: q.dequantize() for site, q in start.items()})
        if before == 0:
            return {}
        grids = {site: Grid(view.weights[site], q) for site, q in start.items()}
        learned = {site: [p.requires_grad_() for p in self.learned(grid)] for site, grid in grids.items()}
        flat = [p for own in learned.values() for p in own]
        state: list[dict[str, Tensor]] = [{} for _ in flat]
        for count, batches in enumerate(self._schedule(view)):
            with torch.enable_grad():
                matrices = {site: grid.values(*self.codes(grid, learned[site])) for site, grid in grids.items()}
                loss: Tensor = sum(w * (view.run(b, kept | matrices) - view.target(b)).float().square().sum() for b, w in batches) / before  # type: ignore[assignment]
                loss = loss + sum(self.penalty(grid, learned[site], count / self.steps) for site, grid in grids.items())
                gradients = list(torch.autograd.grad(loss, flat))
            with torch.no_grad():
                self.step(flat, gradients, state, self.lr * (1 - count / self.steps), count)
        found = {site: self.final(grid, learned[site]) for site, grid in grids.items()}
        after = _error(view, kept | {site: q.dequantize() for site, q in found.items()})
        return found if after < before else {}

    def _schedule(self, view: BlockView) -> Iterator[list[tuple[int, float]]]:
        """(batch, weight) for each step: one ordinary batch in place of all, and each batch of another weight in its share."""
        plain = [b for b, share in enumerate(view.shares) if share == 1] or list(range(len(view.shares)))
        special = [(b, share) for b, share in enumerate(view.shares) if b not in set(plain)]
        order: list[int] = []
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            if not order:
                order = torch.randperm(len(plain), generator=generator).tolist()
            b = plain[order.pop()]
            yield [(b, len(plain) * view.shares[b]), *special]


@torch.no_grad()
def _error(view: BlockView, matrices: Mapping[Site, Tensor]) -> float:
    """The weighted squared error of the block's outputs over all batches."""
    return float(sum(share * (view.run(b, matrices) - view.target(b)).double().square().sum() for b, share in enumerate(view.shares)))


@dataclass(frozen=True, kw_only=True)
class SignRound(Reconstruction):
    """Shift each weight by up to half a step before it is rounded, and stretch each scale; steps follow the sign of the gradient.

    Source: https://arxiv.org/abs/2309.05516 (AutoRound).  Differs: it starts from the codes of the weight solver (GPTQ, say), so a shift of nothing
    is that solution; scales move by a factor that leaves codes alone, in place of the two ends of the range.

    lr:       a weight moves by up to steps · lr / 2 steps of its grid; the paper's is 1 / steps, which lets it move by half a step
    scale_lr: step size of the scales' factors, as a fraction of lr
    """

    name: ClassVar[str] = "signround"
    steps: int = 60
    lr: float = 0.01
    scale_lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_lr < 0:
            raise SpecError(f"scale_lr is 0 or more, got {self.scale_lr}")

    def learned(self, grid: Grid) -> list[Tensor]:
        return [torch.zeros(grid.shape), torch.zeros_like(grid.scale)]

    def codes(self, grid: Grid, learned: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        shift, stretch = learned
        return grid.rounded(grid.z + shift), stretch.exp()

    def step(self, parameters: list[Tensor], gradients: list[Tensor], state: list[dict[str, Tensor]], lr: float, count: int) -> None:
        for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            p -= (lr if i % 2 == 0 else lr * self.scale_lr) * g.sign()
            if i % 2 == 0:
                p.clamp_(-0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class AdaRound(Reconstruction):
    """Round each weight up or down, whichever the block's outputs want, by a sigmoid that is pressed to 0 or 1 over time.

    Source: https://arxiv.org/abs/2004.10568, equations 21 to 24, over whole blocks as BRECQ (https://arxiv.org/abs/2102.05426).
    Differs: no Fisher weights, which BRECQ has; "down" is the floor of the weight after it was moved next to the start's code, so the start is one
    of the choices; the loss is relative to the start's, so `pressure` means the same in every block.

    pressure: weight of Σ(1 - |2h - 1|^β) per weight of the block, β falling from 20 to 2, after the first fifth of the steps
    """

    name: ClassVar[str] = "adaround"
    lr: float = 0.02
    pressure: float = 1.0

    def learned(self, grid: Grid) -> list[Tensor]:
        up = (grid.z - grid.z.floor()).clamp(0.01, 0.99)
        # the inverse of the stretched sigmoid
        return [-(1.2 / (up + 0.1) - 1).log()]

    def codes(self, grid: Grid, learned: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        codes = grid.z.floor() + _stretched(learned[0])
        return codes.clamp(grid.spec.format.lo, grid.spec.format.hi), None

    def final(self, grid: Grid, learned: list[Tensor]) -> QTensor:
        codes = grid.z.floor() + (_stretched(learned[0].detach()) >= 0.5)
        return grid.stored(codes.clamp(grid.spec.format.lo, grid.spec.format.hi))

    def penalty(self, grid: Grid, learned: list[Tensor], done: float) -> Tensor | float:
        if done < 0.2:
            return 0.0
        beta = 2 + 18 * (1 - (done - 0.2) / 0.8)
        return self.pressure * (1 - (2 * _stretched(learned[0]) - 1).abs().pow(beta)).mean()


def _stretched(v: Tensor) -> Tensor:
    """The sigmoid, stretched to (-0.1, 1.1) and clipped, so that 0 and 1 are reached.  AdaRound, equation 23"""
    return (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class LearnedClipping(Reconstruction):
    """Learn the range of each block of weights; every weight goes to the nearest number of what that gives.

    Source: https://arxiv.org/abs/2308.13137 (OmniQuant), learnable weight clipping.  Differs: the start is the weight solver's scale, not the full
    range, and one factor moves both ends; an integer zero point and a float offset stay.  It throws away the codes of its start, so a start that is
    better than nearest rounding (GPTQ) is better than what this finds: let RTN go before it.
    """

    name: ClassVar[str] = "lwc"
    lr: float = 0.01

    def learned(self, grid: Grid) -> list[Tensor]:
        return [torch.zeros_like(grid.scale)]

    def codes(self, grid: Grid, learned: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        factor = learned[0].exp()
        zero = spread(grid.offset, grid.block, grid.shape) if grid.offset is not None and grid.spec.offset is Offset.CODE else 0.0
        return grid.rounded((grid.raw - zero) / spread(factor, grid.block, grid.shape) + zero), factor

    def final(self, grid: Grid, learned: list[Tensor]) -> QTensor:
        # the codes belong to the scales as they are stored
        with torch.no_grad():
            stored = grid.stored(grid.codes, learned[0].exp())
            factor = torch.where(grid.scale == 0, 1.0, stored.scale() / torch.where(grid.scale == 0, 1.0, grid.scale))
            return grid.stored(self.codes(grid, [factor.log()])[0], factor)
