"""One low-rank layer, forward and backward, with every matrix product in the numbers of a recipe.

    product                                    | result   | groups along
    Y0 = Q_A(X) · Q_A(W)ᵀ                      | [n, out] | in
    H  = Q_A(X) · Q_A(A)ᵀ                      | [n, r]   | in
    Y  = Y0 + s · Q_A(H) · Q_A(B)ᵀ             | [n, out] | r
    dB = s · Q_G(dYᵀ) · Q_A(Hᵀ)ᵀ               | [out, r] | n
    dH = s · Q_G(dY) · Q_A(Bᵀ)ᵀ                | [n, r]   | out
    dA = Q_G(dHᵀ) · Q_A(Xᵀ)ᵀ                   | [r, in]  | n
    dX = Q_G(dY) · Q_A(Wᵀ)ᵀ + Q_G(dH) · Q_A(Aᵀ)ᵀ | [n, in] | out, r

X and H are kept for the backward pass as Q_A(Xᵀ) and Q_A(Hᵀ), the form in which dA and dB read them, and in no other.  Quantizers let gradients
through unchanged (straight-through).  Products are computed as those of the values, in float32: up to float32's own rounding of sums these are the
integer products, which `qcore.training.integer_product` computes as hardware would, and which tests compare.  Between products numbers are float.

Source: GSQ-Tuning, https://arxiv.org/abs/2502.12913, section 3.  No code was released.  Inferred here, not read: which axis each copy of a tensor is
grouped along; stochastic rounding of gradients (an option); the exponent bias of a gradient's tensor; that operators between products stay float.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from qcore.numbers import QuantSpec
from qcore.training import CodedRows, SavedRows, code_rows, save_rows
from qcore.training.saved import Keep
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The numbers of one layer's products.

    activation: of inputs, of the low-rank inner activations, and of weights and adapters where they are multiplied; None = float
    gradient:   of gradients; None = float
    rounding:   of gradients: "spec", as the spec rounds, or "stochastic"
    keep:       how saved codes lie in memory: see `qcore.training.SavedRows`
    """

    activation: QuantSpec | None
    gradient: QuantSpec | None
    rounding: Literal["spec", "stochastic"] = "spec"
    keep: Keep = "packed"


FLOAT = Numbers(activation=None, gradient=None)


@dataclass
class Tally:
    """What is counted while layers run.

    groups:  operand → (all-zero groups, groups) of coded gradients
    kept:    bytes that were kept for backward passes since it was last set to 0
    """

    groups: dict[str, list[int]] = field(default_factory=dict)
    kept: int = 0

    def note(self, operand: str, rows: CodedRows) -> None:
        own = self.groups.setdefault(operand, [0, 0])
        own[0] += rows.zero_groups()
        own[1] += rows.levels.shape[0] * rows.levels.shape[1]

    def fractions(self) -> dict[str, float]:
        """The share of all-zero groups, by operand."""
        return {operand: zero / groups for operand, (zero, groups) in sorted(self.groups.items())}


class FrozenWeight:
    """A weight [out, in] that is read from where it is stored, coded anew for each product.

    read: the values that are stored
    hold: keep what products read, as float32 in both directions: eight bytes a weight, for a simulation that would code the same weight in every pass
    """

    def __init__(self, read: Callable[[], Tensor], *, hold: bool = False) -> None:
        self._read, self._hold = read, hold
        self._held: dict[tuple[str, QuantSpec | None], Tensor] = {}

    def rows(self, spec: QuantSpec | None) -> Tensor:
        """Grouped along its inputs.  [out, in]"""
        return self._values("rows", spec, lambda w: w)

    def columns(self, spec: QuantSpec | None) -> Tensor:
        """Grouped along its outputs.  [in, out]"""
        return self._values("columns", spec, lambda w: w.T)

    def _values(self, way: str, spec: QuantSpec | None, turned: Callable[[Tensor], Tensor]) -> Tensor:
        if (held := self._held.get((way, spec))) is not None:
            return held
        with torch.no_grad():
            value = values_of(turned(self._read()), spec)
        if self._hold:
            self._held[way, spec] = value
        return value


def values_of(x: Tensor, spec: QuantSpec | None) -> Tensor:
    """`x` [R, K] on the spec's grid, groups along K; as it is without a spec."""
    return x if spec is None else code_rows(x, spec).values()


@dataclass
class CodedInput:
    """One input X [n, K] as all layers that read it see it; coded when first asked for."""

    x: Tensor
    numbers: Numbers
    tally: Tally
    _values: Tensor | None = None
    _kept: "SavedRows | Tensor | None" = None

    def values(self) -> Tensor:
        if self._values is None:
            self._values = values_of(self.x, self.numbers.activation)
        return self._values

    def kept(self) -> "SavedRows | Tensor":
        if self._kept is None:
            self._kept = keep_columns(self.x, self.numbers, self.tally)
        return self._kept


def keep_columns(x: Tensor, numbers: Numbers, tally: Tally) -> SavedRows | Tensor:
    """X [n, K] as its own gradient's product will read it: coded along n, or as it is."""
    if numbers.activation is None:
        tally.kept += x.numel() * x.element_size()
        return x
    saved = save_rows(code_rows(x.T, numbers.activation), numbers.keep)
    tally.kept += saved.nbytes()
    return saved


class SharedInputs:
    """Inputs by the tensor that they were made of, so that q, k and v (gate and up) code and keep one copy.  An entry goes with its tensor."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self._known: Any = WeakTensorKeyDictionary()

    def of(self, x: Tensor, numbers: Numbers) -> CodedInput:
        """x: [..., K]"""
        found: dict[Any, CodedInput] | None = self._known.get(x)
        key = (numbers, -1 if x.is_inference() else x._version)
        if found is None or key not in found:
            # a copy of the tensor's data without its history: the entry must not keep alive what it hangs on
            found = {key: CodedInput(x.detach().reshape(-1, x.shape[-1]), numbers, self.tally)}
            self._known[x] = found
        return found[key]


class Dither:
    """The generator of stochastic rounding; `begin` makes what follows depend on its numbers alone."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.begin(0, 0)

    def begin(self, step: int, part: int) -> None:
        from qcore.training.trainer import seeded

        self.generator = seeded(self.seed, step, part, 0xD1)


@dataclass(frozen=True)
class Surroundings:
    """What the layers of a model share, and one layer's own constants.

    differentiates: whether autograd is on; inside a function it is always off, and what it is told to need says nothing of it
    """

    frozen: FrozenWeight
    numbers: Numbers
    scaling: float
    tally: Tally
    dither: Dither
    differentiates: bool = True

    def gradient(self, x: Tensor, operand: str) -> Tensor:
        """`x` [R, K] as a gradient is coded, groups along K."""
        n = self.numbers
        if n.gradient is None:
            return x
        rows = code_rows(x, n.gradient, n.rounding, self.dither.generator)
        self.tally.note(operand, rows)
        return rows.values()


class LowRankStep(torch.autograd.Function):
    """The products of the table above.  apply(X [n, in], A [r, in], B [out, r], coded input, surroundings) → Y [n, out]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, coded: CodedInput, around: Surroundings) -> Tensor:
        spec, values = around.numbers.activation, coded.values()
        h = values @ values_of(a, spec).T
        y = values @ around.frozen.rows(spec).T
        y.addmm_(values_of(h, spec), values_of(b, spec).T, alpha=around.scaling)
        if around.differentiates and any(ctx.needs_input_grad):
            kept_x, kept_h = coded.kept(), keep_columns(h, around.numbers, around.tally)
            ctx.around, ctx.shells = around, (_shell(kept_x), _shell(kept_h))
            ctx.save_for_backward(a, b, *_tensors(kept_x), *_tensors(kept_h))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        around: Surroundings = ctx.around
        spec, s = around.numbers.activation, around.scaling
        a, b, *tensors = ctx.saved_tensors
        x_columns, rest = _columns(ctx.shells[0], tensors)
        h_columns, _ = _columns(ctx.shells[1], rest)
        by_out = around.gradient(dy, "dY along out")
        db = s * (around.gradient(dy.T, "dY along n") @ h_columns.T)
        dh = s * (by_out @ values_of(b.T, spec).T)
        da = around.gradient(dh.T, "dH along n") @ x_columns.T
        dx = None
        if ctx.needs_input_grad[0]:
            dx = by_out @ around.frozen.columns(spec).T
            dx.addmm_(around.gradient(dh, "dH along r"), values_of(a.T, spec).T)
        return dx, da, db, None, None


def _tensors(kept: SavedRows | Tensor) -> list[Tensor]:
    return [kept] if isinstance(kept, Tensor) else list(kept.tensors.values())


def _shell(kept: SavedRows | Tensor) -> tuple[SavedRows, tuple[str, ...]] | None:
    """All of it but its tensors, which autograd keeps."""
    return None if isinstance(kept, Tensor) else (replace(kept, tensors={}), tuple(kept.tensors))


def _columns(shell: tuple[SavedRows, tuple[str, ...]] | None, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The kept tensor, [K, n], and the tensors that are not its."""
    if shell is None:
        return tensors[0].T, tensors[1:]
    saved, names = shell
    own, rest = tensors[: len(names)], tensors[len(names) :]
    return saved.rows(dict(zip(names, own, strict=True))).values(), rest
