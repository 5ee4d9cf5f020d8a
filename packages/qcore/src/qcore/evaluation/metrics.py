"""How far a model is from another: streaming, in float64, exact over the whole vocabulary.

All functions take rows of logits [T, V]; nothing is truncated to the likeliest tokens, because the tail is where low-bit models go wrong.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# float64 scratch of one chunk of rows; three of them live at once
_CHUNK_BYTES = 32 * 2**20


def log_probs(logits: Tensor) -> Tensor:
    """[..., V] float64, normalized."""
    return torch.log_softmax(logits.double(), dim=-1)


def kl_rows(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference ‖ candidate) of each row, in nats.  [T, V], [T, V] logits → [T] float64"""
    p, q = log_probs(reference), log_probs(candidate)
    # 0 · (-inf - -inf) is 0 here: what the reference never says costs nothing
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


def nll_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of each row, in nats.  [T, V], [T] → [T] float64"""
    return -log_probs(logits).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def same_top1(reference: Tensor, candidate: Tensor) -> Tensor:
    """Whether both put the same entry first.  [T, V], [T, V] → [T] bool"""
    return reference.argmax(-1) == candidate.argmax(-1)


@dataclass
class Mean:
    """A mean over rows, and its standard error over windows.

    Rows of one window are correlated, so the error is that of the window means: their standard deviation over √n.
    """

    total: float = 0.0
    rows: int = 0
    windows: list[float] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        """One window's rows.  [T]"""
        own = float(values.double().sum())
        self.total += own
        self.rows += values.numel()
        self.windows.append(own / values.numel())

    @property
    def mean(self) -> float:
        return self.total / self.rows if self.rows else math.nan

    @property
    def standard_error(self) -> float:
        """NaN for fewer than two windows."""
        n = len(self.windows)
        if n < 2:
            return math.nan
        middle = sum(self.windows) / n
        return math.sqrt(sum((w - middle) ** 2 for w in self.windows) / (n - 1) / n)


@dataclass
class Distance:
    """Everything that is measured between two models' logits, one window at a time."""

    kl: Mean = field(default_factory=Mean)
    top1: Mean = field(default_factory=Mean)
    nll: Mean = field(default_factory=Mean)
    nll_reference: Mean = field(default_factory=Mean)
    hits: Mean = field(default_factory=Mean)
    hits_reference: Mean = field(default_factory=Mean)
    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Tensor, candidate: Tensor, targets: Tensor | None = None) -> None:
        """One window.  [T, V], [T, V] logits; targets [T]: what came next, or the label, where it is known"""
        kl, top1, nll, nll_reference, hits, hits_reference = ([] for _ in range(6))
        rows = max(1, _CHUNK_BYTES // (8 * reference.shape[-1]))
        for i in range(0, len(reference), rows):
            r, c = reference[i : i + rows], candidate[i : i + rows]
            kl.append(kl_rows(r, c))
            top1.append(same_top1(r, c).double())
            self.signal += float(r.double().square().sum())
            self.noise += float((r.double() - c.double()).square().sum())
            if targets is not None:
                t = targets[i : i + rows]
                nll.append(nll_rows(c, t))
                nll_reference.append(nll_rows(r, t))
                hits.append((c.argmax(-1) == t).double())
                hits_reference.append((r.argmax(-1) == t).double())
        self.kl.add(torch.cat(kl))
        self.top1.add(torch.cat(top1))
        if targets is not None:
            for mean, values in ((self.nll, nll), (self.nll_reference, nll_reference), (self.hits, hits), (self.hits_reference, hits_reference)):
                mean.add(torch.cat(values))

    @property
    def sqnr_db(self) -> float:
        """Signal-to-noise ratio of the outputs themselves, 10·log10(Σ r² / Σ (r - c)²); infinite when they are equal."""
        return sqnr_db(self.signal, self.noise)


def sqnr_db(signal: float, noise: float) -> float:
    """10·log10(signal / noise) of two sums of squares."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def perplexity(nll: float) -> float:
    """exp of the mean negative log-likelihood; infinite where that is beyond a float."""
    return math.exp(nll) if nll < 700 else math.inf
