"""From the float weight of a site to its codes, and to the packed module in its leaf's place."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Seen
from qcore.errors import CalibrationError, at
from qcore.model.layers import layout
from qcore.model.topology import Site
from qcore.modules.online import Online
from qcore.modules.replace import Stored, quantized_leaf, quantized_stack
from qcore.numbers import QTensor
from qcore.numbers.tensor import concat_rows, require_finite, rows_are_apart, split_rows
from qcore.pipeline.record import SiteRecord, relative_error
from qcore.pipeline.views import leaf_at, rows_of
from qcore.pipeline.wishes import Wishes
from qcore.remarks import listening, remark


@dataclass(frozen=True)
class Solution:
    """The codes of one weight.  error, of, remarks: see `SiteRecord`; seconds: of the solver; shift: what the bias is to lose, [N], or None"""

    codes: QTensor
    error: float
    of: str
    seconds: float
    remarks: tuple[str, ...] = ()
    shift: Tensor | None = None


def shared_out(costs: Sequence[float], count: int) -> list[int]:
    """Who of `count` does which piece of work: the costliest first, each to the one with the least to do so far."""
    loads, who = [0.0] * count, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        who[i] = loads.index(min(loads))
        loads[who[i]] += costs[i]
    return who


class SiteSolver:
    """Solves the weights of a model in place.  Until a leaf is replaced it holds the values of its codes."""

    def __init__(self, model: nn.Module, wishes: Wishes) -> None:
        self.model, self.wishes = model, wishes
        self._own_stacks: set[str] = set()

    def together(self, stage: Sequence[Site], seen: Mapping[Site, Seen]) -> list[list[Site]]:
        """The sites of a stage, those in one list that one solve serves: the same input, spec and solver, and rows that are solved apart anyway.

        q, k and v are one matrix with more rows then: the same codes, in a third of the steps over columns.
        """
        groups: dict[Any, list[Site]] = {}
        for site in stage:
            spec, gram = self.wishes.spec(site), seen[site].get("gram")
            shared = gram is not None and gram.ndim == 2 and rows_are_apart(spec)
            key = (id(gram), spec, id(self.wishes.solver(site))) if shared else site
            groups.setdefault(key, []).append(site)
        return list(groups.values())

    def cost(self, sites: Sequence[Site]) -> float:
        """How much work `solve` is, as far as a shape tells: N K², what a column-wise solver does."""
        shapes = [self.matrix(site).shape for site in sites]
        return float(sum(n * k * k for n, k in shapes))

    def solve(self, sites: Sequence[Site], seen: Seen) -> list[Solution]:
        """Choose the codes of weights that share their input."""
        matrices = [self.matrix(site) for site in sites]
        for site, matrix in zip(sites, matrices, strict=True):
            with at(site):
                self.wishes.spec(site).check(tuple(matrix.shape))
                require_finite(matrix)
        started = time.perf_counter()
        with at(", ".join(map(str, sites))), listening() as heard:
            _look_at(seen.get("gram"))
            q = self.wishes.solver(sites[0]).solve(matrices[0] if len(sites) == 1 else torch.cat(matrices), self.wishes.spec(sites[0]), seen)
        pieces = [q] if len(sites) == 1 else split_rows(q, [m.shape[0] for m in matrices])
        seconds = (time.perf_counter() - started) / len(sites)
        found = []
        for site, matrix, piece in zip(sites, matrices, pieces, strict=True):
            values = piece.dequantize().to(matrix.dtype)
            shift = bias_shift(matrix, values, seen) if self.wishes.corrects_bias(site) else None
            remarks = (*heard, *_remarks_on(matrix))
            found.append(Solution(piece, *relative_error(matrix, values, seen.get("gram")), seconds, remarks, shift))
        return found

    def matrix(self, site: Site) -> Tensor:
        """The float weight of a site, [N, K]."""
        owner = leaf_at(self.model, site.module)
        own, param = layout(owner, site.tensor), getattr(owner, site.tensor)
        if site.part is not None and own.piece is not None:
            return own.piece(param.detach(), site.part).clone()
        whole = own.matrix(param.detach())
        rows = rows_of(site, whole, param)
        return whole if rows is None else whole[rows]

    def settle(self, site: Site, solution: Solution) -> SiteRecord:
        """Let the float module in place hold the values that the codes stand for, and write down how well they do."""
        q = solution.codes
        owner = leaf_at(self.model, site.module)
        own, param = layout(owner, site.tensor), getattr(owner, site.tensor)
        values = q.dequantize().to(param.dtype)
        if site.part is not None and own.piece is not None:
            # a stack is copied once, not once for each of its experts; the copy is this run's own
            if site.param not in self._own_stacks:
                param.data = param.data.clone()
                self._own_stacks.add(site.param)
            own.piece(param.data, site.part).copy_(values)
        else:
            whole = own.matrix(param.detach())
            rows = rows_of(site, whole, param)
            if rows is not None:
                whole = whole.clone()
                whole[rows] = values
            param.data = own.tensor(values if rows is None else whole, param.shape).contiguous()
        bias = getattr(owner, "bias", None)
        if solution.shift is not None and isinstance(bias, nn.Parameter):
            bias.data = bias.data - solution.shift.to(bias.dtype)
        packing = self.wishes.packing(site, q.shape)
        nbytes = sum(t.numel() * t.element_size() for t in packing.pack(q).values())
        return SiteRecord(
            site=str(site),
            spec=str(q.spec),
            solver=repr(self.wishes.solver(site)),
            packing=packing.name,
            shape=q.shape,
            error=solution.error,
            of=solution.of,
            bits=round(8 * nbytes / prod(q.shape), 4),
            nbytes=nbytes,
            seconds=round(solution.seconds, 4),
            remarks=solution.remarks,
        )

    def replace(self, path: str, solved: Mapping[Site, QTensor], inputs: Mapping[Site, Mapping[str, Tensor]]) -> None:
        """Put the packed module where the float leaf was.  inputs: scale and offset of the inputs that have static ones"""
        leaf = leaf_at(self.model, path)
        wrapper = self.model.get_submodule(path)
        first = next(iter(solved))
        if any(site.part is not None or site.tensor != "weight" for site in solved):
            packed = {}
            for site, q in solved.items():
                packed[(site.tensor, site.part)] = Stored(
                    weight=q,
                    packing=self.wishes.packing(site, q.shape),
                    activation=self.wishes.reads(site),
                    activation_parts=inputs.get(site.input, {}),
                )
            self.model.set_submodule(path, quantized_stack(leaf, packed))
            return
        q = concat_rows([solved[site] for site in sorted(solved, key=lambda s: [r.start for r in s.channels])])
        stored = Stored(
            weight=q,
            packing=self.wishes.packing(first, q.shape),
            activation=self.wishes.reads(first),
            activation_parts=inputs.get(first.input, {}),
            online=wrapper.before if isinstance(wrapper, Online) else None,
        )
        self.model.set_submodule(path, quantized_leaf(leaf, stored))


def bias_shift(weight: Tensor, values: Tensor, seen: Seen) -> Tensor:
    """(Ŵ - W)·E[x]: what the codes add to the mean of each output channel.  [N] float64

    weight, values: [N, K];  seen: with the moments of the inputs, [P, K] where the rows of P parts see different ones (grouped convolutions)
    """
    if "moments" not in seen:
        raise CalibrationError("bias correction got no moments of the inputs; pass calibration batches")
    mean = seen["moments"].mean.double()  # [K], or [P, K]
    delta = (values - weight).double().unflatten(0, (mean.shape[0] if mean.ndim == 2 else 1, -1))
    return (delta @ mean.reshape(delta.shape[0], -1, 1)).flatten()


def _look_at(gram: Tensor | None) -> None:
    """Remark on inputs that calibration did not see."""
    if gram is None:
        return
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if dead := int((diagonal == 0).sum()):
        remark(f"{dead} of {diagonal.numel()} inputs were zero on all calibration rows; their weights are rounded to nearest")


def _remarks_on(matrix: Tensor) -> tuple[str, ...]:
    """What is unusual about a float weight."""
    empty = int((matrix == 0).all(1).sum())
    return (f"{empty} of {matrix.shape[0]} rows are all zero",) if empty else ()
