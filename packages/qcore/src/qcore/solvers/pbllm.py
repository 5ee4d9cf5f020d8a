"""PB-LLM: GPTQ's loop over columns with two kinds of numbers, one bit for most weights and 8 for the salient ones."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.numbers import QTensor, QuantSpec
from qcore.numbers.partly_binary import PartlyBinary, topmost
from qcore.numbers.tensor import require_finite
from qcore.solvers.gptq import _checked_gram


@dataclass(frozen=True, kw_only=True)
class PBLLM:
    """Partial binarization: for each group of columns, choose the salient weights, fit the numbers of the others, round column by column.

    Source: https://arxiv.org/abs/2310.00034, section 3.2, and its released code.
    Differs: means and spreads are those of the weights that are not salient (the released code averages over zeros in the salient places); salient
    weights have a step for each row and group, where the source has one for each row.

    saliency: "hessian": w² / [H⁻¹]_kk as GPTQ's loop sees it, U_kk² with U the upper Cholesky factor of H⁻¹; "magnitude": |w|
    damp:     added to the Gram's diagonal, as a fraction of its mean
    """

    name: ClassVar[str] = "pb-llm"
    saliency: Literal["hessian", "magnitude"] = "hessian"
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.saliency not in ("hessian", "magnitude"):
            raise SpecError(f"saliency is hessian or magnitude, got {self.saliency!r}")
        if not self.damp > 0:
            raise SpecError(f"damping is a positive fraction, got damp={self.damp}")

    @property
    def observes(self) -> tuple[Observer, ...]:
        from qcore.calibration.observers import Gram

        return (Gram(),)

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen, frozen: Tensor | None = None) -> QTensor:
        """See `WeightSolver.solve`."""
        fmt, (n, k) = spec.format, tuple(weight.shape)
        spec.check((n, k))
        height, cols = spec.granularity.block((n, k))
        if not isinstance(fmt, PartlyBinary) or spec.scaled or height != 1:
            raise SpecError(f"PB-LLM solves the format 'partly-binary' in groups of a row (granularity 'unscaled-tile' with rows = 1), got {spec}")
        if frozen is not None:
            raise SpecError("PB-LLM keeps no entries frozen; leave out the transform that splits this weight, or use GPTQ")
        gram = _checked_gram(weight, seen)
        require_finite(weight)
        u = _upper(gram.double(), self.damp)  # [P, K, K]
        w = weight.detach().double().unflatten(0, (u.shape[0], -1)).clone()  # [P, N/P, K]
        codes = torch.empty(w.shape, dtype=torch.uint8)
        groups: list[dict[str, Tensor]] = []
        for a in range(0, k, cols):
            b = min(a + cols, k)
            here = w[:, :, a:b]
            # magnitudes are those of the weight itself: what it has grown to while it made up for errors says less
            size = weight[:, a:b].abs() if self.saliency == "magnitude" else here.abs() / u[:, a:b, a:b].diagonal(dim1=1, dim2=2).unsqueeze(1)
            salient = topmost(size, fmt.count(n * (b - a))).view(here.shape)
            parts = fmt.fit_around(here, salient)
            errors = torch.zeros_like(here)
            for j in range(b - a):
                x = here[:, :, j]
                codes[:, :, a + j] = torch.where(salient[:, :, j], fmt.levels(x, parts), fmt.binary(x, parts))
                errors[:, :, j] = (x - fmt.decode(codes[:, :, a + j], parts)) / u[:, a + j, a + j, None]
                here[:, :, j + 1 :] -= errors[:, :, j, None] * u[:, a + j, None, a + j + 1 : b]
            w[:, :, b:] -= errors @ u[:, a:b, b:]
            groups.append(parts)
        found = {name: torch.stack([g[name].flatten() for g in groups], 1) for name in fmt.parts}  # [N, G]
        return QTensor(spec, {"codes": codes.flatten(0, 1), **found}, (n, k))


def _upper(gram: Tensor, damp: float) -> Tensor:
    """U upper triangular with UᵀU = H⁻¹, H the damped Gram.  [P, K, K] float64"""
    mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    h = gram + torch.diag_embed((damp * mean).unsqueeze(1).expand(-1, gram.shape[-1]))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
