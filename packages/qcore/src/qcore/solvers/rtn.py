"""Round to nearest: every weight on its own."""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from qcore.calibration.observer import Observer, Seen
from qcore.errors import CalibrationError
from qcore.numbers import QTensor, QuantSpec, quantize
from qcore.numbers.tensor import require_finite
from qcore.solvers.scales import Lattice, ScaleSearch, choose_all, per_row


def nearest_like(solver: object) -> "RTN":
    """Rounding to nearest without data, with the options of another solver's scale search: for weights whose inputs were never seen."""
    options = {f.name: getattr(solver, f.name) for f in fields(ScaleSearch)} if isinstance(solver, ScaleSearch) else {}
    return RTN(**options)


@dataclass(frozen=True, kw_only=True)
class RTN(ScaleSearch):
    """Round every weight to the nearest number that the spec can store, after a search for the scales.

    Any format, granularity and offset.  One-bit integers get the mean magnitude as their scale, which is the least-squares one.

    weighted: weigh each input's error by its mean square (the Gram's diagonal), which turns the search towards the inputs that matter, as
              importance matrices do in llama.cpp; needs calibration data
    """

    name: ClassVar[str] = "rtn"
    weighted: bool = False

    @property
    def observes(self) -> tuple[Observer, ...]:
        if not self.weighted:
            return ()
        from qcore.calibration.observers import Gram

        return (Gram(),)

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen, frozen: Tensor | None = None) -> QTensor:
        """See `WeightSolver.solve`.  Frozen entries take no part in the search for scales."""
        w = weight.detach().float()
        require_finite(w)
        importance = self._importance(w, seen)  # [K, 1], [K, N] or None
        if frozen is not None:
            free = frozen.isnan()
            w = torch.where(free, w, 0.0)
            importance = free.T.float() if importance is None else importance * free.T
        if spec.format.shared:  # parts of all blocks at once: nothing to search block by block
            return quantize(w, spec, weight=None if importance is None else importance.T.expand_as(w))
        lattice = Lattice(spec, tuple(w.shape))
        choose_all(w.T.contiguous(), lattice, self, importance)
        return quantize(w, spec, lattice.parts())

    def _importance(self, w: Tensor, seen: Seen) -> Tensor | None:
        if not self.weighted:
            return None
        if "gram" not in seen:
            raise CalibrationError("RTN(weighted=True) got no 'gram' of the inputs; calibrate this site, or use RTN()")
        return per_row(seen["gram"].diagonal(dim1=-2, dim2=-1).float(), w.shape[0])
