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


def stream(folder: Path, adapter: ModelAdapter, *, dtype: torch.dtype | None = None, registry: Any = None) -> StreamedModel:
    """The model that `save` wrote, to be run block by block.

    adapter: the one with which the model was quantized
    dtype:   in which it computes; None = the checkpoint's own

    CheckpointError as `load`, except that values are read when their block is run.
    """
    registry = resolved(registry)
    manifest = Manifest.read(folder)
    manifest.require(registry, str(folder / MANIFEST), adapter=False)
    reader = open_shards(folder, manifest)
    model = skeleton_of(folder, manifest, registry)
    adapter.prepare(model)
    blocks = adapter.topology(model).blocks  # of the float architecture: links are none of ours here
    model = place_modules(model, manifest, registry)
    check_fit(model, manifest, reader, folder)
    modules = [model.get_submodule(b.module) for b in blocks]
    materialize_outside(model, modules, reader)
    tie(model, manifest)
    serve = dtype or getattr(torch, manifest.dtype)
    bind(model, manifest, registry, torch.device("cpu"))
    outside = [n for n, owner, own, is_param in owned_names(model, "") if not any(within(n, b.module) for b in blocks)]
    if empty := [n for n in outside if _tensor_of(model, n).is_meta]:
        raise CheckpointError(f"{folder}: {len(empty)} tensors have no values, such as {empty[0]}")
    serve_in(model, serve)

    def fill(block: Block) -> None:
        module = model.get_submodule(block.module)
        materialize(module, block.module, reader)
        serve_in(module, serve)
        for m in module.modules():
            if callable(changed := getattr(m, "parts_changed", None)):
                changed()

    return StreamedModel(model.eval(), adapter, blocks, fill)


def _tensor_of(model: Any, name: str) -> torch.Tensor:
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    return owner._parameters[own] if own in owner._parameters else owner._buffers[own]
