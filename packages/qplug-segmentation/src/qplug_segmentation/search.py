"""Scales by what comes out: candidates for a weight and for an input, searched in turn, each judged by the weighted error of the layer's output.

Score of a candidate: -Σ (∂L/∂out)² · (out - out')², the diagonal of the empirical Hessian of the loss in the output.
Source: PTQ4ViT, https://arxiv.org/abs/2111.12293, section 3.3, as PTQ4RIS uses it.  What is searched is quantized on both sides: while one operand is
searched the other one already has its numbers (the release of PTQ4ViT leaves it float, its issue 22).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from qcore.numbers import NumberFormat, QuantSpec
from qcore.numbers.tensor import store_scale
from torch import Tensor

from qplug_segmentation.capture import LayerRows, ProductRows
from qplug_segmentation.formats import MOST_SHIFTS, DualRegion, GeluRegions, StepGrid
from qplug_segmentation.regions import affine_grid, symmetric_grid


@dataclass(frozen=True)
class Candidates:
    """Factors of the range of the data: `count` ones, evenly from `least` to `most`; `rounds` times weight and input in turn.

    The numbers of PTQ4ViT: 100 from .01 to 1.2, three rounds.
    """

    count: int = 100
    least: float = 0.01
    most: float = 1.2
    rounds: int = 3

    @property
    def factors(self) -> list[float]:
        return torch.linspace(self.least, self.most, self.count).tolist()


def rounded(fmt: NumberFormat, x: Tensor) -> Tensor:
    return fmt.decode(fmt.encode(x))


def symmetric_family(x: Tensor, bits: int, c: Candidates) -> list[NumberFormat]:
    """Grids around zero."""
    start = symmetric_grid(float(x.abs().max()), bits)
    return [StepGrid(bits, start.step * f, start.first) for f in c.factors]


def affine_family(x: Tensor, bits: int, c: Candidates) -> list[NumberFormat]:
    """Grids over a shrunk or widened range."""
    low, high = float(x.min()), float(x.max())
    return [affine_grid(low * f, high * f, bits) for f in c.factors]


def gelu_family(x: Tensor, bits: int, c: Candidates) -> list[NumberFormat]:
    """A fixed step below zero, candidates above it."""
    start = max(float(x.max()), 1e-6) / (2 ** (bits - 1) - 0.5)
    return [GeluRegions(bits, start * f) for f in c.factors]


def softmax_family(x: Tensor, bits: int, c: Candidates) -> list[NumberFormat]:
    """Every split of the dual region."""
    return [DualRegion(bits, i) for i in range(MOST_SHIFTS + 1)]


def probability_family(x: Tensor, bits: int, c: Candidates) -> list[NumberFormat]:
    """One region from zero: what stands in for `softmax_family` when it is left out."""
    step = float(x.max()) / (2**bits - 1)
    return [StepGrid(bits, step * f, 0) for f in c.factors]


Family = Callable[[Tensor, int, Candidates], list[NumberFormat]]


@dataclass(frozen=True)
class FoundLayer:
    """scales: of the weight, one for each group of rows, as stored; input: the format of what it reads; error: the mean weighted squared error."""

    scales: tuple[float, ...]
    input: NumberFormat
    error: float


def search_layer(rows: LayerRows, weight: Tensor, spec: QuantSpec, bits: int, family: Family, c: Candidates, groups: int = 1) -> FoundLayer:
    """Scales of a weight and the format of its input.

    weight: [N, K];  spec: what is stored of it, a scale for each row;  bits: of the input;  groups: of N / groups rows with one scale (3 for q, k, v)
    """
    n = weight.shape[0]
    x, w = rows.x, weight.float()
    heavy = _weights(rows.grad, x.shape[0], n)
    target = x @ w.T
    start = w.abs().unflatten(0, (groups, -1)).amax((1, 2)) / (2 ** (spec.format.bits - 1) - 0.5)  # [groups]
    start = torch.where(start > 0, start, 1.0)
    tried = torch.stack([store_scale(start * f, spec)["scale"].float() for f in c.factors])  # [C, groups]
    formats = family(x, bits, c)
    # both start at the range of the data, the factor nearest to 1
    fmt = formats[min(range(len(formats)), key=lambda i: abs(c.factors[i] - 1))] if len(formats) == c.count else formats[0]
    scale, error, before = tried[0], 0.0, None
    for _ in range(max(c.rounds, 1)):
        xq = rounded(fmt, x)
        per_group = torch.stack([_error(xq @ on_scale(w, s, spec).T, target, heavy).unflatten(0, (groups, -1)).sum(1) for s in tried])
        scale = tried.gather(0, per_group.argmin(0, keepdim=True))[0]
        wq = on_scale(w, scale, spec)
        errors = [float(_error(rounded(f, x) @ wq.T, target, heavy).sum()) for f in formats]
        best = min(range(len(formats)), key=errors.__getitem__)
        fmt, error = formats[best], errors[best] / target.numel()
        if before == (scale.tolist(), best):
            break  # nothing moved: a further round would repeat this one
        before = (scale.tolist(), best)
    return FoundLayer(tuple(scale.tolist()), fmt, error)


def on_scale(w: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """A weight [N, K] on the grid of these scales, one for each group of rows."""
    rows = scale.repeat_interleave(w.shape[0] // scale.shape[0]).unsqueeze(1)
    # what `fake_quantize` does for integers without an offset, without its checks: it runs hundreds of times
    return (w / rows).round_().clamp_(spec.format.lo, spec.format.hi).mul_(rows)


def search_product(
    a: Tensor, b: Tensor, grad: Tensor | None, a_formats: Sequence[NumberFormat], b_formats: Sequence[NumberFormat], rounds: int
) -> tuple[NumberFormat, NumberFormat]:
    """Formats of both operands of a @ b, in turn, each while the other one is quantized.  a: [..., T, K], b: [..., K, N]"""
    target = a @ b
    heavy = torch.ones(()) if grad is None else _normal(grad.square())

    def best(formats: Sequence[NumberFormat], product: Callable[[NumberFormat], Tensor]) -> NumberFormat:
        return min(formats, key=lambda f: float((heavy * (product(f) - target).square()).sum()))

    own = [min(formats, key=lambda f, x=x: float((rounded(f, x) - x).square().sum())) for formats, x in ((a_formats, a), (b_formats, b))]  # type: ignore[misc]
    fa, fb = own
    for _ in range(max(rounds, 1)):
        bq = rounded(fb, b)
        na = best(a_formats, lambda f, bq=bq: rounded(f, a) @ bq)  # type: ignore[misc]
        aq = rounded(na, a)
        nb = best(b_formats, lambda f, aq=aq: aq @ rounded(f, b))  # type: ignore[misc]
        if (na, nb) == (fa, fb):
            break
        fa, fb = na, nb
    return fa, fb


@dataclass(frozen=True)
class FoundProducts:
    """Formats of the operands of an attention."""

    q: NumberFormat
    k: NumberFormat
    v: NumberFormat
    p: NumberFormat


def search_products(rows: ProductRows, bits: int, softmax: Family, c: Candidates) -> FoundProducts:
    """q·kᵀ with symmetric grids, p·v with the family of `softmax` for p and a symmetric grid for v."""
    k = rows.k.transpose(-1, -2)
    q_format, k_format = search_product(rows.q, k, rows.scores, symmetric_family(rows.q, bits, c), symmetric_family(k, bits, c), c.rounds)
    p_format, v_format = search_product(rows.p, rows.v, rows.outputs, softmax(rows.p, bits, c), symmetric_family(rows.v, bits, c), c.rounds)
    return FoundProducts(q_format, k_format, v_format, p_format)


def _normal(squares: Tensor) -> Tensor:
    """Weights of mean 1: the size of the loss does not matter, and float32 holds their sums."""
    return squares / squares.mean().clamp(min=torch.finfo(squares.dtype).tiny)


def _weights(grad: Tensor | None, t: int, n: int) -> Tensor:
    return torch.ones(t, n) if grad is None else _normal(grad.double().square()).float()


def _error(out: Tensor, target: Tensor, heavy: Tensor) -> Tensor:
    """Σ over rows of weight · squared error.  [T, N] → [N]"""
    return ((out - target).square() * heavy).sum(0)
