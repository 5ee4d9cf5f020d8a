"""The observers that qcore brings: what was seen at a site, in one pass, resumable and mergeable.

Each one keeps a small state that is a sum over rows in the wide sense: `_summarize` makes the state of one batch, `_join` puts two states together.
So rows may come in any batches, stop and go on, or come from several ranks, and the result is the same: exactly for extremes and counts, up to the
order of float additions for sums.  A row of weight 2 counts as two rows, one of weight 0 (padding) was never there, NaN and all.

| class | name | result, for rows [T, K] | state |
|---|---|---|---|
| Gram | "gram" | mean of x xᵀ, [K, K] | upper blocks, float32 |
| Moments | "moments" | n, mean, mean of the magnitude, mean square, [K] each | sums, float64 |
| AbsMax | "absmax" | largest magnitude of each channel, [K] | itself |
| MinMax | "minmax" | range (low, high), [1] or [K] each | itself |
| Ema | "ema" | exponential average of the rows' ranges, [1] each | two decayed sums, float64 |
| Histogram | "histogram" | (edges, counts) | counts of 2 × bins magnitudes, float64 |
| Percentile | "percentile" | range that holds all but a tail, [1] each | histogram |
| MSE | "mse" | range with the least error under a spec, [1] each | histogram |
| KL | "kl" | range with the least divergence, [1] each | histogram |
| Spikes | "spikes" | largest magnitude of a token over the median token's, a float | largest, counts |

Ranges always include zero, as `qcore.numbers.block_range` does, and go straight into `scale_parts(low, high, spec)`.  Rows of grouped layers are
[P, T, K]: results per channel are then [P, K] ([P, K, K] for the Gram); ranges of the tensor stay [1].
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from qcore.calibration.observer import Observer
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import Int, PerTensor, QuantSpec, fake_quantize, scale_parts

State = dict[str, Tensor]


@dataclass(kw_only=True)
class StreamingObserver(Observer):
    """An observer whose state is a sum over rows; subclasses say how one batch looks, and how two states become one.

    parts: names of the state's tensors
    """

    parts: ClassVar[tuple[str, ...]]
    _state: State = field(default_factory=dict, init=False, repr=False, compare=False)

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> State:
        """The state after these rows alone.  rows: [T, K] or [P, T, K] finite, T > 0; weight: [T] positive float64, or None"""
        raise NotImplementedError

    def _join(self, a: State, b: State) -> State:
        """The state after the rows of `a`, then those of `b`; may reuse the tensors of `a`."""
        raise NotImplementedError

    def _finish(self, state: State) -> Any:
        """The summary, from the state of at least one row."""
        raise NotImplementedError

    def update(self, rows: Tensor, weight: Tensor | None = None) -> None:
        rows, weight = self._checked(rows, weight)
        if rows.shape[-2]:
            self._take(self._summarize(rows, weight))

    def result(self) -> Any:
        if not self._state:
            raise CalibrationError(
                f"observer {self.name!r} saw no rows; calibrate on more samples, select samples that reach this place, or leave the site unquantized"
            )
        return self._finish(self._state)

    def state(self) -> State:
        return {name: part.clone() for name, part in self._state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._state = {}
        self.merge([state])

    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> None:
        for state in states:
            if not state:
                continue
            if set(state) != set(self.parts):
                raise CalibrationError(
                    f"observer {self.name!r} keeps {', '.join(self.parts)}, but the state to go on from has {', '.join(sorted(state))}"
                )
            self._take({name: part.clone() for name, part in state.items()})

    def _take(self, new: State) -> None:
        for name, part in self._state.items():
            if part.shape != new[name].shape:
                raise CalibrationError(
                    f"observer {self.name!r} has {name} of shape {tuple(part.shape)} and now got {tuple(new[name].shape)}; "
                    "one observer sees the rows of one site, with the same options"
                )
        self._state = self._join(self._state, new) if self._state else new

    def _checked(self, rows: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Finite rows of positive weight, in float32 or float64; half precision is cast up, which is exact."""
        if rows.ndim not in (2, 3):
            raise CalibrationError(f"observer {self.name!r} sees rows [T, K] or [P, T, K], got shape {tuple(rows.shape)}")
        rows = rows.detach()
        if weight is not None:
            if weight.shape != rows.shape[-2:-1]:
                raise CalibrationError(f"observer {self.name!r} got {rows.shape[-2]} rows but weights of shape {tuple(weight.shape)}")
            weight = weight.detach().double()
            if not (torch.isfinite(weight) & (weight >= 0)).all():
                raise CalibrationError(f"observer {self.name!r}: row weights are negative, NaN or infinite; one is an importance, 0 = no row")
            kept = weight > 0
            if not kept.all():
                rows, weight = rows[..., kept, :], weight[kept]
        rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        # one pass without a copy: NaN and infinity both show in the extremes
        if rows.numel() and not torch.isfinite(torch.stack(rows.aminmax())).all():
            bad = ~torch.isfinite(rows).all(-1)
            raise CalibrationError(
                f"observer {self.name!r}: {int(bad.sum())} of {bad.numel()} rows hold NaN or infinity (first at {tuple(bad.nonzero()[0].tolist())}); "
                "run the float model in bfloat16 or float32, or mask padding with row weight 0"
            )
        return rows, weight


def _mass(rows: Tensor, weight: Tensor | None) -> Tensor:
    """The sum of the row weights, float64."""
    return torch.tensor(float(rows.shape[-2]), dtype=torch.float64, device=rows.device) if weight is None else weight.sum()


@dataclass(kw_only=True)
class Gram(StreamingObserver):
    """Σ w x xᵀ / Σ w: the mean outer product of the inputs, [K, K] float32 ([P, K, K] for grouped layers).

    It is half the Hessian of a layer's mean squared output error ‖x(W - Ŵ)ᵀ‖² by each row of W (GPTQ's H is twice it, up to damping).

    dtype: of products and sums.  bfloat16 is not offered: torch rounds a bfloat16 product to 8 bits, and a relative error of 2^-9 is more than the
           small eigenvalues, so the Cholesky factor fails.  Inputs in bfloat16 lose nothing: products of two are exact in float32

    Only block columns on and above the diagonal are computed, with 8 of them 56 % of the products; `result` mirrors them.
    """

    name: ClassVar[str] = "gram"
    parts: ClassVar[tuple[str, ...]] = ("sum", "mass", "rows")
    dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float64"):
            raise SpecError(f"observer 'gram' multiplies in float32 or float64, got dtype={self.dtype!r}; lower precision breaks the Cholesky factor")

    @property
    def rows(self) -> int:
        """How many rows of positive weight were seen."""
        return int(self._state["rows"]) if self._state else 0

    def update(self, rows: Tensor, weight: Tensor | None = None) -> None:
        rows, weight = self._checked(rows, weight)
        T, K = rows.shape[-2:]
        if not T:
            return
        if not self._state:
            self._state = {
                "sum": torch.zeros(*rows.shape[:-2], K, K, dtype=getattr(torch, self.dtype), device=rows.device),
                "mass": torch.zeros((), dtype=torch.float64, device=rows.device),
                "rows": torch.zeros((), dtype=torch.int64, device=rows.device),
            }
        total = self._state["sum"]
        if total.shape != (*rows.shape[:-2], K, K):
            raise CalibrationError(f"observer 'gram' has a sum of shape {tuple(total.shape)} and now got rows of shape {tuple(rows.shape)}")
        x = rows.to(total.dtype)
        wx = x if weight is None else x * weight.to(x.dtype).unsqueeze(-1)
        for g, a, b in zip(total.view(-1, K, K), x.reshape(-1, T, K), wx.reshape(-1, T, K), strict=True):
            for lo, hi in _block_columns(K):
                g[lo:hi, lo:].addmm_(b[:, lo:hi].T, a[:, lo:])
        self._state["mass"] += _mass(rows, weight)
        self._state["rows"] += T

    def _join(self, a: State, b: State) -> State:
        return {name: a[name] + b[name] for name in self.parts}

    def _finish(self, state: State) -> Tensor:
        upper = state["sum"].triu() / state["mass"].to(state["sum"].dtype)
        gram = (upper + upper.triu(1).mT).float()
        if not torch.isfinite(gram).all():
            raise CalibrationError("observer 'gram' overflowed: squares of inputs exceed 3e38; leave the site unquantized")
        return gram


def _block_columns(k: int) -> list[tuple[int, int]]:
    """At most 8 column blocks of at least 128: narrower ones cost a matrix product more in calls than they save in work."""
    count = min(8, max(1, k // 128))
    cuts = [round(i * k / count) for i in range(count + 1)]
    return list(itertools.pairwise(cuts))


class ChannelMoments(NamedTuple):
    """n: the number of rows, by weight, [] float64; the others [K] ([P, K]) float64."""

    n: Tensor
    mean: Tensor
    mean_abs: Tensor
    mean_square: Tensor


@dataclass(kw_only=True)
class Moments(StreamingObserver):
    """n, mean, mean magnitude and mean square of each channel, in float64: what AWQ, bias correction and variance-aware allocators ask for."""

    name: ClassVar[str] = "moments"
    parts: ClassVar[tuple[str, ...]] = ("n", "sum", "sum_abs", "sum_square")

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> State:
        x = rows.double()
        w = torch.ones(x.shape[-2], dtype=x.dtype, device=x.device) if weight is None else weight
        return {"n": w.sum(), "sum": w @ x, "sum_abs": w @ x.abs(), "sum_square": w @ x.square()}

    def _join(self, a: State, b: State) -> State:
        return {name: a[name] + b[name] for name in self.parts}

    def _finish(self, state: State) -> ChannelMoments:
        n = state["n"]
        return ChannelMoments(n.clone(), state["sum"] / n, state["sum_abs"] / n, state["sum_square"] / n)


@dataclass(kw_only=True)
class AbsMax(StreamingObserver):
    """The largest magnitude of each channel, [K] ([P, K]) float32: SmoothQuant's activation statistic."""

    name: ClassVar[str] = "absmax"
    parts: ClassVar[tuple[str, ...]] = ("high",)

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> State:
        low, high = rows.aminmax(dim=-2)
        return {"high": torch.maximum(-low, high).float()}

    def _join(self, a: State, b: State) -> State:
        return {"high": torch.maximum(a["high"], b["high"])}

    def _finish(self, state: State) -> Tensor:
        return state["high"].clone()


Range = tuple[Tensor, Tensor]


def _with_zero(low: Tensor, high: Tensor) -> Range:
    """Float32 ends of a range that includes zero; numbers become shape [1]."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    return (low.reshape(1), high.reshape(1)) if low.ndim == 0 else (low, high)


_OCTAVES, _PER_OCTAVE = 80, 32  # bins of `Spikes`: 2^-40 … 2^40, each 2.2 % wide


@dataclass(kw_only=True)
class Spikes(StreamingObserver):
    """ρ = max / median over tokens of the token's largest magnitude: 10 is usual, 1000 is a layer that no per-tensor scale fits.

    Source: activation spikes, https://arxiv.org/abs/2405.14428.  Differs: over all tokens seen, where the source takes the mean of the samples'
    ratios; so tokens may come in any batches.  The median is that of a histogram, within 1.1 %.
    """

    name: ClassVar[str] = "spikes"
    parts: ClassVar[tuple[str, ...]] = ("largest", "counts")

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> State:
        tokens = rows.abs().amax(-1)
        tokens = tokens.amax(0) if tokens.ndim == 2 else tokens
        bins = ((tokens.double().clamp(min=2.0**-_OCTAVES).log2() + _OCTAVES / 2) * _PER_OCTAVE).floor().clamp(0, _OCTAVES * _PER_OCTAVE - 1).long()
        counts = torch.zeros(_OCTAVES * _PER_OCTAVE, dtype=torch.float64)
        counts.index_add_(0, bins, torch.ones_like(tokens, dtype=torch.float64) if weight is None else weight.double())
        return {"largest": tokens.amax().reshape(1).float(), "counts": counts}

    def _join(self, a: State, b: State) -> State:
        return {"largest": torch.maximum(a["largest"], b["largest"]), "counts": a["counts"] + b["counts"]}

    def _finish(self, state: State) -> float:
        so_far = state["counts"].cumsum(0)
        middle = int(torch.searchsorted(so_far, so_far[-1] / 2))
        median = 2.0 ** ((middle + 0.5) / _PER_OCTAVE - _OCTAVES / 2)
        return float(state["largest"]) / median


@dataclass(kw_only=True)
class MinMax(StreamingObserver):
    """The smallest range that holds every value seen, and zero.

    granularity: "tensor": [1] each; "channel": [K] ([P, K]) each, one range for every channel
    """

    name: ClassVar[str] = "minmax"
    parts: ClassVar[tuple[str, ...]] = ("low", "high")
    granularity: Literal["tensor", "channel"] = "tensor"

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "channel"):
            raise SpecError(f"observer 'minmax' has granularity 'tensor' or 'channel', got {self.granularity!r}")

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> State:
        low, high = rows.aminmax() if self.granularity == "tensor" else rows.aminmax(dim=-2)
        return {"low": low.float(), "high": high.float()}

    def _join(self, a: State, b: State) -> State:
        return {"low": torch.minimum(a["low"], b["low"]), "high": torch.maximum(a["high"], b["high"])}

    def _finish(self, state: State) -> Range:
        return _with_zero(state["low"], state["high"])


@dataclass(kw_only=True)
class Ema(StreamingObserver):
    """The exponential moving average of the rows' ranges: late rows count more, one outlier row little.

    momentum: what remains of the average after one more row; 0.999 forgets half of it in 693 rows.  The start is corrected as Adam's is: one row
              alone gives its own range.  torch's observer decays once a batch, so that the result depends on the batch size; this one decays by rows
    """

    name: ClassVar[str] = "ema"
    parts: ClassVar[tuple[str, ...]] = ("low", "high", "mass")
    momentum: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise SpecError(f"observer 'ema' has momentum in [0, 1), got {self.momentum}")

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> State:
        # grouped rows: row t of all groups is one row
        together = rows if rows.ndim == 2 else rows.transpose(0, 1).flatten(1)
        low, high = together.aminmax(dim=-1)
        w = torch.ones_like(low, dtype=torch.float64) if weight is None else weight
        later = w.flip(0).cumsum(0).flip(0) - w
        share = (1 - self._decay(w)) * self._decay(later)
        return {"low": share @ low.double(), "high": share @ high.double(), "mass": w.sum()}

    def _decay(self, rows: Tensor) -> Tensor:
        return torch.tensor(self.momentum, dtype=torch.float64, device=rows.device) ** rows

    def _join(self, a: State, b: State) -> State:
        kept = self._decay(b["mass"])
        return {"low": a["low"] * kept + b["low"], "high": a["high"] * kept + b["high"], "mass": a["mass"] + b["mass"]}

    def _finish(self, state: State) -> Range:
        share = 1 - self._decay(state["mass"])
        return _with_zero(state["low"] / share, state["high"] / share)


# histograms ------------------------------------------------------------------------------------------------------------------------------

# no bin is narrower than 2^-100 / bins: what is smaller counts as zero
_LOWEST_EXPONENT = -100
_CHUNK = 1 << 22


@dataclass(kw_only=True)
class Histogram(StreamingObserver):
    """Counts of magnitudes, of negative and of other values, in `bins` bins each over [0, 2^e).

    2^e is the smallest power of two above the largest magnitude A seen.  When a larger one comes, bins are added in pairs until it fits: a bin of the
    wide histogram is exactly the union of bins of the narrow one, so splitting and merging lose nothing.  At least half of the bins are in use: a bin
    is at most 2·A / bins wide.

    bins: per sign, a power of two
    result: (edges [2·bins + 1], counts [2·bins]), float64, ascending from -2^e to 2^e; bin i holds edges[i] < x ≤ edges[i+1] below zero,
            edges[i] ≤ x < edges[i+1] from zero on
    """

    name: ClassVar[str] = "histogram"
    parts: ClassVar[tuple[str, ...]] = ("counts", "exponent", "low", "high")
    bins: int = 16384

    def __post_init__(self) -> None:
        if self.bins < 2 or self.bins & (self.bins - 1):
            raise SpecError(f"observer {self.name!r} has a power of two of bins, at least 2, got {self.bins}")

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> State:
        low, high = rows.aminmax()
        exponent = torch.frexp(torch.maximum(-low, high))[1].long().clamp(min=_LOWEST_EXPONENT)
        # a product with a power of two is exact, so that the bin of a value does not depend on the batch it came in
        per_unit = 2.0 ** (math.log2(self.bins) - int(exponent))
        counts = torch.zeros(2 * self.bins, dtype=torch.float64, device=rows.device)
        values = rows.flatten(0, -2)
        weights = None if weight is None else weight.repeat(values.shape[0] // weight.shape[0])
        step = max(1, _CHUNK // max(1, values.shape[1]))
        for start in range(0, values.shape[0], step):
            x = values[start : start + step]
            index = (x.abs() * per_unit).long() + (x >= 0).long() * self.bins
            w = None if weights is None else weights[start : start + step].unsqueeze(1).expand_as(index).flatten()
            counts += torch.bincount(index.flatten(), w, minlength=2 * self.bins)
        return {"counts": counts.view(2, self.bins), "exponent": exponent, "low": low.float(), "high": high.float()}

    def _join(self, a: State, b: State) -> State:
        exponent = torch.maximum(a["exponent"], b["exponent"])
        return {
            "counts": _widen(a["counts"], int(exponent - a["exponent"])) + _widen(b["counts"], int(exponent - b["exponent"])),
            "exponent": exponent,
            "low": torch.minimum(a["low"], b["low"]),
            "high": torch.maximum(a["high"], b["high"]),
        }

    def _take(self, new: State) -> None:
        if new["counts"].shape != (2, self.bins):
            bins = new["counts"].shape[-1]
            raise CalibrationError(f"observer {self.name!r} has {self.bins} bins, but the state to go on from has {bins}; use bins={bins}")
        super()._take(new)

    def _ascending(self, state: State) -> tuple[Tensor, Tensor]:
        positive = torch.arange(self.bins + 1, dtype=torch.float64, device=state["counts"].device) * self._width(state)
        return torch.cat([-positive.flip(0), positive[1:]]), torch.cat([state["counts"][0].flip(0), state["counts"][1]])

    def _width(self, state: State) -> float:
        return 2.0 ** int(state["exponent"]) / self.bins

    def _finish(self, state: State) -> tuple[Tensor, Tensor]:
        return self._ascending(state)


def _widen(counts: Tensor, doublings: int) -> Tensor:
    """The same counts in bins 2^doublings times as wide.  [2, bins]"""
    if doublings == 0:
        return counts
    bins = counts.shape[1]
    # 2^log2(bins) already puts all of them into the first bin
    index = torch.arange(bins, device=counts.device) >> min(doublings, 62)
    return torch.zeros_like(counts).index_add_(1, index, counts)


@dataclass(kw_only=True)
class Percentile(Histogram):
    """The range that leaves at most a share 1 - q of the values out at each end.

    q: 0.999999 leaves one value in a million at either end; 1 is the exact minimum and maximum

    Error: an end is never inside the exact order statistic, and at most one bin, 2·A / bins, outside of it (A: the largest magnitude seen).
    """

    name: ClassVar[str] = "percentile"
    q: float = 0.99999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 < self.q <= 1:
            raise SpecError(f"observer 'percentile' has q in (0.5, 1], got {self.q}; 0.999 is 99.9 %")

    def _finish(self, state: State) -> Range:
        edges, counts = self._ascending(state)
        below, above = counts.cumsum(0), counts.flip(0).cumsum(0)
        high = edges[1:][_first(below >= self.q * below[-1])]
        low = edges[:-1].flip(0)[_first(above >= self.q * above[-1])]
        return _with_zero(torch.maximum(low.float(), state["low"]), torch.minimum(high.float(), state["high"]))


def _first(flags: Tensor) -> Tensor:
    return flags.int().argmax()


@dataclass(kw_only=True)
class MSE(Histogram):
    """The range, shrunk from the extremes in equal steps, for which the spec's rounding and clipping err least: min Σ |Q(x) - x|^p.

    spec: what the range is for: one scale for the tensor, a fixed grid
    p:    2.4 as in GPTQ and QuaRot; 2 is the mean squared error
    steps, shrink: the extremes times 1 - i / steps, for i < shrink · steps

    Values stand for the middle of their bin: an error moves by at most half a bin, A / bins.
    """

    name: ClassVar[str] = "mse"
    spec: QuantSpec = field(default_factory=lambda: QuantSpec(format=Int(8), granularity=PerTensor()))
    p: float = 2.4
    steps: int = 100
    shrink: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.spec.granularity, PerTensor):
            raise SpecError(f"observer 'mse' finds one range for a whole tensor, got a spec {self.spec}; use granularity 'tensor'")
        if self.spec.format.parts:
            raise SpecError(f"observer 'mse' searches a range for a fixed grid, but {self.spec.format} is fitted to the data")
        if self.p <= 0 or self.steps < 1 or not 0 < self.shrink <= 1:
            raise SpecError(f"observer 'mse' needs p > 0, steps ≥ 1 and shrink in (0, 1], got p={self.p}, steps={self.steps}, shrink={self.shrink}")

    def for_spec(self, spec: QuantSpec) -> Self:
        return replace(self, spec=spec)

    def _finish(self, state: State) -> Range:
        edges, counts = self._ascending(state)
        middles = ((edges[1:] + edges[:-1]) / 2).float()
        used = counts > 0
        # the outermost values are known exactly
        x, counts = middles[used].clamp(state["low"], state["high"]), counts[used]
        low, high = _with_zero(state["low"], state["high"])
        best, least = (low, high), math.inf
        for i in range(max(1, math.ceil(self.shrink * self.steps))):
            factor = 1 - i / self.steps
            error = fake_quantize(x, self.spec, scale_parts(low * factor, high * factor, self.spec)) - x
            total = float((error.double().abs() ** self.p * counts).sum())
            if total < least:
                best, least = (low * factor, high * factor), total
        return best


@dataclass(kw_only=True)
class KL(Histogram):
    """The symmetric range [-t, t] whose `bits`-bit histogram diverges least from the values' own: TensorRT's entropy calibration.

    For every threshold t at the end of a bin: P is the histogram of magnitudes up to t, with all that lies beyond added to its last bin; Q is the
    same without what lies beyond, averaged over 2^(bits-1) equal ranges, each spread over its non-empty bins; minimize Σ P log(P / Q).
    A threshold whose last bin is empty while values lie beyond has infinite divergence.  The bin of zero counts like all others, where
    pytorch-quantization replaces it by its neighbour: ReLU outputs are mostly zero.

    bins: 2048 as in TensorRT; the ends are at most 2·A / bins wider than the values they keep
    Source: S. Migacz, 8-bit Inference with TensorRT, GTC 2017.
    """

    name: ClassVar[str] = "kl"
    bins: int = 2048
    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 8 or 1 << (self.bits - 1) > self.bins:
            raise SpecError(f"observer 'kl' has 2 to 8 bits and at least 2^(bits-1) bins, got bits={self.bits}, bins={self.bins}")

    def for_spec(self, spec: QuantSpec) -> Self:
        if not isinstance(spec.format, Int):
            raise SpecError(f"observer 'kl' compares histograms of integers, got {spec}; take minmax, percentile or mse")
        return replace(self, bits=spec.format.bits)

    def _finish(self, state: State) -> Range:
        levels = 1 << (self.bits - 1)
        counts = state["counts"].sum(0)
        ends = torch.arange(levels, self.bins + 1, device=counts.device)  # candidate thresholds, in bins
        t = float(ends[_divergence(counts, ends, levels).argmin()]) * self._width(state)
        return _with_zero(state["low"].clamp(min=-t), state["high"].clamp(max=t))


def _divergence(counts: Tensor, ends: Tensor, levels: int) -> Tensor:
    """KL(P ‖ Q) for each candidate in `ends`, all at once from running sums.  counts: [bins] → [len(ends)]

    Within one level, Q is constant on the non-empty bins: Σ P log(P/Q) = Σ_bins P log P - Σ_levels (Σ P) log Q.
    """

    def running(v: Tensor) -> Tensor:
        return torch.cat([v.new_zeros(1), v.cumsum(0)])

    mass, filled, entropy = running(counts), running((counts > 0).double()), running(torch.xlogy(counts, counts))
    total = mass[-1]
    edges = ends.unsqueeze(1) * torch.arange(levels + 1, device=counts.device) // levels  # [C, levels + 1]
    inside = mass[edges].diff(dim=1)
    q = inside / filled[edges].diff(dim=1).clamp(min=1) / mass[ends].unsqueeze(1).clamp(min=torch.finfo(torch.float64).tiny)
    beyond, last = total - mass[ends], counts[ends - 1]
    p_level = inside.clone()
    p_level[:, -1] += beyond
    # Σ P log P with P = counts / total, the last bin holding `beyond` as well
    p_entropy = (entropy[ends] - torch.xlogy(last, last) + torch.xlogy(last + beyond, last + beyond)) / total - total.log()
    divergence = p_entropy - torch.xlogy(p_level / total, q).sum(1)
    return torch.where((last == 0) & (beyond > 0), torch.inf, divergence)
