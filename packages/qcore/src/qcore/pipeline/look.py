"""What an allocator sees of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qcore.calibration.observer import Observer, Seen
from qcore.errors import CalibrationError, QcoreError
from qcore.model.adapter import Batch, ModelAdapter
from qcore.model.reader import materialize
from qcore.model.tap import running
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec
from qcore.pipeline.blocks import in_place
from qcore.pipeline.skeleton import Skeleton
from qcore.pipeline.wishes import Wishes
from qcore.plan import packed_bytes
from qcore.recipe import resolve_scale
from qcore.solvers.allocate import WholeModel
from qcore.transforms.channels import site_matrix
from qcore.transforms.rewrite import owner_of

Observe = Callable[[Mapping[Site, Sequence[Observer]]], Iterator[Mapping[Site, Seen]]]


class RunLook:
    """A `Look` at a run that has fitted its transforms.  observe: runs the float model block by block, and yields what each block's sites saw"""

    def __init__(self, skeleton: Skeleton, wishes: Wishes, adapter: ModelAdapter, batches: Sequence[Batch], observe: Observe, stream: bool) -> None:
        self.skeleton, self.wishes, self.adapter, self.batches, self._observe, self._stream = skeleton, wishes, adapter, batches, observe, stream
        self._sizes: dict[tuple[QuantSpec, tuple[int, ...], str], int] = {}

    def weight(self, site: Site) -> Tensor:
        return site_matrix(site, self.skeleton.reader[site.param], owner_of(self.skeleton.owners, site.param))

    def stored(self, spec: QuantSpec) -> QuantSpec:
        return resolve_scale(spec, self.wishes.dtype_name)

    def nbytes(self, site: Site, spec: QuantSpec) -> int | None:
        shape, own = tuple(self.weight(site).shape), self.stored(spec)
        try:
            own.check(shape)
            packing = self.wishes.packing_for(site, own, shape)
        except QcoreError:
            return None
        key = (own, shape, packing.name)
        if key not in self._sizes:
            self._sizes[key] = packed_bytes(packing, own, shape)
        return self._sizes[key]

    def observe(self, wants: Mapping[Site, Sequence[Observer]]) -> Iterator[tuple[Site, Seen]]:
        if not self.batches:
            raise CalibrationError('the allocator looks at calibration data, and there is none; pass --calib, or take metric "mse"')
        by_input: dict[Site, list[Site]] = {}
        for site in wants:
            by_input.setdefault(site.input, []).append(site)
        for seen in self._observe({site.input: observers for site, observers in wants.items()}):
            for where, own in seen.items():
                for site in by_input.get(where, ()):
                    yield site, own

    def model(self) -> WholeModel:
        if self._stream:
            raise CalibrationError(
                'the allocator\'s metric runs the whole float model, and this run is streamed; take metric "mse" or "output", or more memory'
            )
        return FloatModel(self.skeleton, self.adapter, self.batches)


class FloatModel:
    """The model as rewritten so far, with all its weights; the next step of the run lets go of them again."""

    def __init__(self, skeleton: Skeleton, adapter: ModelAdapter, batches: Sequence[Batch]) -> None:
        contexts = [adapter.context(b) for b in batches]
        # sequence starts are there for the statistics of layers; a model's outputs for one token say little
        kept = [(b, c) for b, c in zip(batches, contexts, strict=True) if c.weight == 1]
        if not kept:
            raise CalibrationError('the allocator runs the whole model on calibration data, and there is none; pass --calib, or take metric "mse"')
        self._pairs, self.adapter, self.skeleton = kept, adapter, skeleton
        self.topology: Topology = skeleton.topology
        skeleton.settle_outside()
        for block in self.topology.blocks:
            skeleton.install(block.module)
            materialize(skeleton.model.get_submodule(block.module), block.module, skeleton.reader, skeleton.compute)

    @property
    def batches(self) -> int:
        return len(self._pairs)

    def outputs(self, batch: int, matrices: Mapping[Site, Tensor] | None = None) -> Tensor:
        given, context = self._pairs[batch]
        with in_place(self.skeleton.model, matrices or {}), running(context):
            out = self.adapter.outputs(self.skeleton.model, given)
        rows, valid = out.reshape(-1, out.shape[-1]), context.valid
        return rows if valid is None or valid.numel() != rows.shape[0] else rows[valid.reshape(-1)]

    @torch.no_grad()
    def blocks(self, batch: int) -> Iterator[tuple[tuple[Site, ...], Tensor, Tensor]]:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = []
        for block in self.topology.blocks:
            module = self.skeleton.model.get_submodule(block.module)

            def keep(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object, path: str = block.module) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                y = output[0] if isinstance(output, tuple) else output
                assert isinstance(y, Tensor)
                seen[path] = (x, y)

            handles.append(module.register_forward_hook(keep, with_kwargs=True))
        try:
            self.outputs(batch)
        finally:
            for handle in handles:
                handle.remove()
        for block in self.topology.blocks:
            x, y = seen[block.module]
            yield block.sites, x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
