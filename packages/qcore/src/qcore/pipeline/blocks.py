"""A block under a block solver: run with other matrices in the place of its weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Seen
from qcore.calibration.runner import BlockFeed
from qcore.checkpoint.journal import Journal
from qcore.errors import CalibrationError, at
from qcore.model.layers import layout
from qcore.model.topology import Site
from qcore.numbers import QTensor
from qcore.pipeline.record import SiteRecord, relative_error
from qcore.pipeline.sites import SiteSolver, Solution
from qcore.pipeline.views import leaf_at, rows_of
from qcore.solvers.base import BlockSolver


class BlockUnderTest:
    """A `BlockView`.  The outputs of the float block are kept when this is made, so make it while the block's weights are float.

    weights: the float matrices of the block's sites
    hidden:  what the block reads in the float model, one tensor a batch; None = what it reads in the quantized one
    """

    def __init__(
        self, feed: BlockFeed, index: int, model: nn.Module, module: nn.Module, weights: Mapping[Site, Tensor], hidden: Sequence[Tensor] | None = None
    ) -> None:
        self.feed, self.index, self.model, self.module, self.weights = feed, index, model, module, weights
        self.start: Mapping[Site, QTensor] = {}
        with torch.no_grad():
            self.outputs = [feed.forward(index, b, module, None if hidden is None else hidden[b]) for b in range(len(feed.batches))]

    @property
    def shares(self) -> Sequence[float]:
        return self.feed.shares

    def target(self, batch: int) -> Tensor:
        return self.feed.rows(self.outputs[batch], batch)

    def run(self, batch: int, matrices: Mapping[Site, Tensor]) -> Tensor:
        with in_place(self.model, matrices):
            return self.feed.rows(self.feed.forward(self.index, batch, self.module), batch)


class BlockStep:
    """The step of a run that a block solver does, block after block; keeps what the float model's next block reads."""

    def __init__(self, solver: BlockSolver, model: nn.Module, sites: SiteSolver, journal: Journal | None) -> None:
        self.solver, self.model, self.sites, self.journal = solver, model, sites, journal
        self._hidden: Sequence[Tensor] | None = None

    def begin(self, feed: BlockFeed | None, index: int, module: nn.Module, sites: Sequence[Site]) -> BlockUnderTest:
        """The block with its float outputs; before any of its weights is solved."""
        if feed is None:
            raise CalibrationError(f"block solver {self.solver.name!r} needs calibration data; pass --calib")
        weights = {site: self.sites.matrix(site).clone() for site in sites}
        if self.solver.target != "float" or feed.rerun:
            return BlockUnderTest(feed, index, self.model, module, weights)
        hidden = self._hidden
        if hidden is None:  # at the first block both models read the same; a resumed run kept what the float model reads
            kept = self.journal.step(f"inputs-{index:05}-float") if self.journal is not None and index else None
            hidden = list(feed.hidden()) if kept is None else [kept[0][str(b)] for b in range(len(feed.batches))]
        test = BlockUnderTest(feed, index, self.model, module, weights, hidden)
        self._hidden = test.outputs
        if self.journal is not None:
            self.journal.keep_step(f"inputs-{index + 1:05}-float", {str(b): h for b, h in enumerate(test.outputs)}, {})
        return test

    def improve(
        self, test: BlockUnderTest, solved: Mapping[Site, tuple[QTensor, SiteRecord]], seen: Mapping[Site, Seen]
    ) -> dict[Site, tuple[QTensor, SiteRecord]]:
        """What the block solver betters of what was found weight by weight."""
        test.start = {site: q for site, (q, _) in solved.items()}
        with at(test.feed.blocks[test.index].module or "the model"):
            found = self.solver.solve_block(test)
        better = {}
        for site, q in found.items():
            error, of = relative_error(test.weights[site], q.dequantize().to(test.weights[site].dtype), seen[site].get("gram"))
            record = self.sites.settle(site, Solution(q, error, of, solved[site][1].seconds))
            better[site] = (q, replace(record, solver=f"{record.solver} + {self.solver!r}"))
        return better


@contextmanager
def in_place(model: nn.Module, matrices: Mapping[Site, Tensor]) -> Iterator[None]:
    """Matrices [N, K] where the parameters of a model are; plain tensors, so that gradients reach whatever they were made of."""
    by_param: dict[str, list[Site]] = {}
    for site in matrices:
        by_param.setdefault(site.param, []).append(site)
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for sites in by_param.values():
            owner, name = leaf_at(model, sites[0].module), sites[0].tensor
            own, param = layout(owner, name), getattr(owner, name)
            whole = own.matrix(param.detach())
            for site in sites:
                rows, value = rows_of(site, whole, param), matrices[site].to(param.dtype)
                whole = value if rows is None else whole.index_copy(0, rows, value)
            kept.append((owner, name, param))
            owner._parameters[name] = own.tensor(whole, param.shape)  # type: ignore[assignment]
        yield
    finally:
        for owner, name, param in kept:
            owner._parameters[name] = param
