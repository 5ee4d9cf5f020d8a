"""A block under a block solver: run with other matrices in the place of its weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qcore.calibration.runner import BlockFeed
from qcore.model.layers import layout
from qcore.model.topology import Site
from qcore.numbers import QTensor
from qcore.pipeline.views import leaf_at, rows_of


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
