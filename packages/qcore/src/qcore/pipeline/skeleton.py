"""Which of a model's modules and weights are there: the skeleton on meta, what is outside the blocks, what a rewrite inserts."""

from typing import Any

import torch
from torch import nn

from qcore.errors import at
from qcore.model.reader import TensorReader, materialize_outside, release, release_outside, retie, tied_groups
from qcore.model.source import LoadedModel
from qcore.model.topology import Topology, within
from qcore.modules.online import Online
from qcore.pipeline.views import LiveReader, Owners, round_parameters
from qcore.transforms.apply import attach_taps, build_insert
from qcore.transforms.rewrite import Insert, Rewrite, RewrittenReader


class Skeleton:
    """A model whose modules are exchanged and whose weights come and go.

    rewrite: what transforms have found so far; whoever finds more puts it here
    """

    def __init__(self, loaded: LoadedModel, topology: Topology, registry: Any, compute: torch.dtype) -> None:
        self.loaded, self.topology, self.registry, self.compute = loaded, topology, registry, compute
        self.model: nn.Module = loaded.model
        self.rewrite = Rewrite()
        self.installed: dict[str, Insert] = {}  # a later transform may split a leaf that an earlier one put there
        self.owners = Owners(self.model)
        self._wrapped: set[str] = set()
        self._ties = tied_groups(self.model)

    @property
    def reader(self) -> TensorReader:
        """The weights as rewritten so far, under the names of the live model."""
        return LiveReader(RewrittenReader(self.loaded.reader, self.rewrite, self.owners), self._wrapped)

    def settle_outside(self, values: bool = True) -> None:
        """Give everything outside the blocks its (rewritten) weights, as they will be stored; blocks go to meta.  values: False = without weights"""
        held = [self.model.get_submodule(b.module) for b in self.topology.blocks]
        rerun = any(b.feed == "rerun" for b in self.topology.blocks)
        for path, insert in list(self.rewrite.inserts.items()):
            if not any(within(path, b.module) for b in self.topology.blocks):
                self._install_one(path, insert)
        if not rerun:
            for block in held:
                release(block)
        if not values:
            retie(self.model, self._ties, self.rewrite.unties)
            return
        materialize_outside(self.model, held, self.reader, self.compute)
        retie(self.model, self._ties, self.rewrite.unties)
        round_parameters(self.model, set(), "", self.loaded.dtype)
        if rerun:
            # later blocks are not reached by the passes of earlier ones, but a forward pass up to a block needs all before it
            for block in held:
                release(block)

    def release_outside(self) -> None:
        """Let go of the weights outside the blocks: they are read again when they are saved."""
        release_outside(self.model, [self.model.get_submodule(b.module) for b in self.topology.blocks])
        retie(self.model, self._ties, self.rewrite.unties)

    def install(self, prefix: str) -> None:
        """Build the run-time modules that the rewrite inserts below `prefix`."""
        for path, insert in list(self.rewrite.inserts.items()):
            if within(path, prefix):
                self._install_one(path, insert)

    def _install_one(self, path: str, insert: Insert) -> None:
        if self.installed.get(path) is insert:
            return
        self.installed[path] = insert
        if insert.place.startswith("tap:"):
            with at(path):
                attach_taps(self.model.get_submodule(path), insert, self.registry.modules)
            return
        with at(path):
            module = build_insert(insert, self.registry.modules).eval()
        if insert.place == "before":
            self.model.set_submodule(path, Online(self.model.get_submodule(path), module))
            self._wrapped.add(path)
        else:
            self.owners.replaced[path] = self.model.get_submodule(path)
            self.model.set_submodule(path, module)
