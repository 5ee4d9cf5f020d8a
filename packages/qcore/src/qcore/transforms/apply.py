"""Run a rewritten model in memory: for exactness checks, conformance tests and learned transforms."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcore.errors import NotFound
from qcore.model.adapter import tied_names
from qcore.model.reader import DictReader, TensorReader
from qcore.model.tap import attach
from qcore.modules.hadamard import HeadHadamard, OnlineHadamard
from qcore.modules.leaves import FLOAT_LEAVES, Nothing
from qcore.modules.online import Online
from qcore.modules.sum import Sum
from qcore.transforms.rewrite import Insert, Rewrite, RewrittenReader

_INSERTABLE: tuple[type[Any], ...] = (OnlineHadamard, HeadHadamard, Sum, Nothing, *FLOAT_LEAVES)
INSERTABLE: Mapping[str, type[Any]] = {cls.name: cls for cls in _INSERTABLE}


def build_insert(insert: Insert, modules: Mapping[str, type[Any]] | None = None) -> nn.Module:
    """The module to insert, its buffers filled.  modules: classes by name, such as `load_registry().modules`; None: qcore's own"""
    classes = INSERTABLE if modules is None else modules
    config = insert.module
    if config.type not in classes:
        raise NotFound(f"a rewrite inserts a module of type {config.type!r}, which is not registered; there are: {', '.join(sorted(classes))}")
    module = classes[config.type].from_config(dict(config.config))
    _, unknown = module.load_state_dict(dict(config.tensors), strict=False)
    if unknown:
        raise NotFound(f"module type {config.type!r} has no buffer {unknown[0]!r}, which the rewrite wants to fill")
    return module


def place_inserts(model: nn.Module, rewrite: Rewrite, modules: Mapping[str, type[Any]] | None = None) -> None:
    """Put the rewrite's modules into `model` in place; parameters are not touched.

    A leaf with a module before it is wrapped (`Online`), which puts ".leaf" into its parameters' names: see `live_name`.
    """
    for path, insert in rewrite.inserts.items():
        if insert.place.startswith("tap:"):
            attach_taps(model.get_submodule(path), insert, modules)
            continue
        module = build_insert(insert, modules).train(model.training)
        if insert.place == "before":
            model.set_submodule(path, Online(model.get_submodule(path), module))
        else:
            model.set_submodule(path, module)


def attach_taps(module: nn.Module, insert: Insert, modules: Mapping[str, type[Any]] | None = None) -> None:
    """Attach a module of its own to every tap that the insert names, in place."""
    for tensor in insert.place.removeprefix("tap:").split(","):
        attach(module, tensor, build_insert(insert, modules).train(module.training))  # type: ignore[arg-type]


def live_name(rewrite: Rewrite, name: str) -> str:
    """What a parameter is called in a model that went through `place_inserts`."""
    path, _, own = name.rpartition(".")
    insert = rewrite.inserts.get(path)
    return f"{path}.leaf.{own}" if insert is not None and insert.place == "before" else name


def rewritten_tensors(model: nn.Module, rewrite: Rewrite, reader: TensorReader | None = None) -> dict[str, Tensor]:
    """Every parameter and buffer that the rewrite changes or makes, by live name, in the dtype that it has in `model`.

    Differentiable in the rewrite's own tensors, so `torch.func.functional_call(model, rewritten_tensors(model, rewrite), …)` is the learner's
    forward pass, on a model that went through `place_inserts` if there are inserts.

    reader: the original tensors; None: the model's own
    """
    source = DictReader(_all_tensors(model)) if reader is None else reader
    rewritten = RewrittenReader(source, rewrite, model)
    return {live_name(rewrite, n): rewritten[n].to(source[rewrite.source(n)].dtype) for n in dict.fromkeys([*rewrite.edits, *rewrite.derived])}


def apply_rewrite(
    model: nn.Module, rewrite: Rewrite, modules: Mapping[str, type[Any]] | None = None, reader: TensorReader | None = None
) -> nn.Module:
    """A deep copy of `model` with edited parameters and inserted modules.

    reader: the original tensors, where the model's own are on meta
    """
    tensors = {name: t.detach() for name, t in rewritten_tensors(model, rewrite, reader).items()}
    twin = copy.deepcopy(model)
    ties = {name: first for name, first in tied_names(model).items() if name not in rewrite.unties}
    place_inserts(twin, rewrite, modules)
    for name, value in tensors.items():
        _set(twin, name, value)
    for name, first in ties.items():
        if live_name(rewrite, name) in tensors:
            path, _, own = live_name(rewrite, name).rpartition(".")
            twin.get_submodule(path)._parameters[own] = twin.get_parameter(live_name(rewrite, first))
    return twin


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


@torch.no_grad()
def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    if own in owner._buffers:
        owner._buffers[own] = value
    else:
        owner._parameters[own] = nn.Parameter(value, requires_grad=False)
