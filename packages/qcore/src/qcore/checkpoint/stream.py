"""A checkpoint that is run block by block, in the memory of one block and what lies outside the blocks."""

from pathlib import Path
from typing import Any

import torch

from qcore.calibration.stream import StreamedModel
from qcore.checkpoint.load import bind, check_fit, open_shards, place_modules, skeleton_of, tie
from qcore.checkpoint.manifest import MANIFEST, Manifest
from qcore.errors import CheckpointError
from qcore.model.adapter import ModelAdapter
from qcore.model.reader import materialize, materialize_outside, owned_names
from qcore.model.topology import Block, within
from qcore.modules import serve_in
from qcore.modules.stored import resolved


class StreamedCheckpoint(StreamedModel):
    """A checkpoint, block by block.  `serve` says in which dtype it computes; until then, and for `explain`, it is the checkpoint's own."""

    dtype: torch.dtype | None = None

    def serve(self, dtype: torch.dtype) -> None:
        """Compute in `dtype` from now on."""
        self.dtype = dtype
        serve_in(self.model, dtype)


def stream(folder: Path | str, adapter: ModelAdapter, *, registry: Any = None) -> StreamedCheckpoint:
    """The model that `save` wrote, to be run block by block.  adapter: the one with which it was quantized

    CheckpointError as `load`, except that values are read when their block is run.
    """
    folder, registry = Path(folder), resolved(registry)
    manifest = Manifest.read(folder)
    manifest.require(registry, str(folder / MANIFEST), adapter=False)
    reader = open_shards(folder, manifest)
    model = skeleton_of(folder, manifest, registry)
    adapter.prepare(model)
    blocks = adapter.topology(model).blocks  # of the float architecture, before quantized modules stand in it
    model = place_modules(model, manifest, registry)
    check_fit(model, manifest, reader, folder)
    materialize_outside(model, [model.get_submodule(b.module) for b in blocks], reader)
    tie(model, manifest)
    outside = [n for n, *_ in owned_names(model, "") if not any(within(n, b.module) for b in blocks)]
    if empty := [n for n in outside if _tensor_of(model, n).is_meta]:
        raise CheckpointError(f"{folder}: {len(empty)} tensors have no values, such as {empty[0]}")
    bind(model, manifest, registry, torch.device("cpu"))

    def fill(block: Block) -> None:
        module = model.get_submodule(block.module)
        materialize(module, block.module, reader)
        if made.dtype is not None:
            serve_in(module, made.dtype)
        for m in module.modules():
            if callable(changed := getattr(m, "parts_changed", None)):
                changed()

    made = StreamedCheckpoint(model.eval(), adapter, blocks, fill)
    return made


def _tensor_of(model: Any, name: str) -> torch.Tensor:
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    return owner._parameters[own] if own in owner._parameters else owner._buffers[own]
