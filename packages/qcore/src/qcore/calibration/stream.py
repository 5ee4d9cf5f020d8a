"""Running a model of which one block is in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qcore.calibration.runner import BlockFeed, BlockRunner, Progress
from qcore.errors import CalibrationError
from qcore.model.adapter import Batch, ModelAdapter
from qcore.model.reader import evaporate
from qcore.model.topology import Block


class StreamedModel:
    """Batches → outputs, block by block: every block is filled once for all batches, and emptied again.

    model:   everything outside the blocks has its weights
    blocks:  in order of execution, each fed by the one before
    fill:    gives one block its weights, in place

    The outputs are those of the whole model, bit for bit: the same modules see the same tensors.
    """

    def __init__(self, model: nn.Module, adapter: ModelAdapter, blocks: Sequence[Block], fill: Callable[[Block], None]) -> None:
        if rerun := [b.module for b in blocks if b.feed == "rerun"]:
            raise CalibrationError(
                f"block {rerun[0]} is not fed by the block before it alone, so {type(model).__name__} cannot be run block by block"
            )
        self.model, self.adapter, self.blocks, self.fill = model, adapter, tuple(blocks), fill

    def __call__(self, batch: Batch) -> Tensor:
        return next(iter(self.each([batch])))

    @torch.no_grad()
    def each(self, batches: Iterable[Batch], progress: Progress | None = None) -> Iterator[Tensor]:
        """The outputs of every batch, in order.  All batches pass a block before the next one is filled."""
        feed = BlockFeed(self.model, self.adapter, self.blocks, list(batches))

        def first(block: Block, call: object) -> object:
            self.fill(block)
            return self.model.get_submodule(block.module)(*call.args, **call.kwargs)  # type: ignore[attr-defined]

        feed.start(first)
        for index, block in enumerate(self.blocks):
            if progress is not None:
                progress("block", index, len(self.blocks))
            if index:
                self.fill(block)
            module = self.model.get_submodule(block.module)
            feed.advance(BlockRunner(feed, index, module, []).outputs())
            evaporate(module)
        for batch in range(len(feed.batches)):
            yield feed.outputs(batch)
