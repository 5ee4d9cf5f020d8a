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
    """

    def __init__(self, feed: BlockFeed, index: int, model: nn.Module, module: nn.Module, weights: Mapping[Site, Tensor]) -> None:
        self.feed, self.index, self.model, self.module, self.weights = feed, index, model, module, weights
        self.start: Mapping[Site, QTensor] = {}
        with torch.no_grad():
            self._targets = [feed.forward(index, b, module) for b in range(len(feed.batches))]

    @property
    def shares(self) -> Sequence[float]:
        return self.feed.shares

    def target(self, batch: int) -> Tensor:
        return self._targets[batch]

    def run(self, batch: int, matrices: Mapping[Site, Tensor]) -> Tensor:
        with self._in_place(matrices):
            return self.feed.forward(self.index, batch, self.module)

    @contextmanager
    def _in_place(self, matrices: Mapping[Site, Tensor]) -> Iterator[None]:
        """Put the matrices where the parameters are; plain tensors, so that gradients reach whatever they were made of."""
        by_param: dict[str, list[Site]] = {}
        for site in matrices:
            by_param.setdefault(site.param, []).append(site)
        kept: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for sites in by_param.values():
                owner, name = leaf_at(self.model, sites[0].module), sites[0].tensor
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
