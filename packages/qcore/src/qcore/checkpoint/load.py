"""Rebuild a model from a checkpoint.  Nothing of calibration, solvers or recipes is imported here."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcore.checkpoint.manifest import MANIFEST, Manifest, natural
from qcore.errors import CheckpointError
from qcore.model import ModelAdapter, SafetensorsReader, materialize
from qcore.model.reader import missing_names, owned_names
from qcore.modules import place, rebuild
from qcore.modules.stored import DTYPES, resolved


def load(
    folder: Path | str,
    *,
    skeleton: nn.Module | None = None,
    adapter: ModelAdapter | None = None,
    device: torch.device | str = "cpu",
    registry: Any = None,
) -> nn.Module:
    """The model that `save` wrote, ready to run.

    skeleton: the float architecture, whose parameters may be on meta; it is changed in place.  None = the checkpoint's own source rebuilds it
    adapter:  prepares the skeleton; None = the one that the checkpoint names
    registry: None = that of this installation

    CheckpointError for whatever is truncated, corrupt, too new, not installed, or does not fit the skeleton.
    """
    folder, registry = Path(folder), resolved(registry)
    manifest = Manifest.read(folder)
    manifest.require(registry, str(folder / MANIFEST), adapter=adapter is None)
    reader = open_shards(folder, manifest)
    model = skeleton if skeleton is not None else skeleton_of(folder, manifest, registry)
    model = install(model, manifest, registry, adapter)
    check_fit(model, manifest, reader, folder)
    materialize(model, "", reader)
    tie(model, manifest)
    if left := [*missing_names(model), *_unsaved_on_meta(model)]:
        raise CheckpointError(
            f"{len(left)} tensors have no values: {', '.join(left[:4])}; build the skeleton inside `qcore.model.parameters_on_meta()`, "
            "which keeps computed buffers"
        )
    model.requires_grad_(False)
    model.to(device)
    bind(model, manifest, registry, torch.device(device))
    return model.eval()


def install(model: nn.Module, manifest: Manifest, registry: Any, adapter: ModelAdapter | None = None) -> nn.Module:
    """Prepare the float `model` and put the manifest's modules, still empty, in their places.

    adapter: None = the one that the manifest names
    return:  `model`, or the module that takes the place of the root
    """
    if adapter is None and manifest.adapter:
        adapter = registry.adapters[manifest.adapter]()
    if adapter is not None:
        adapter.prepare(model)
    return place_modules(model, manifest, registry)


def place_modules(model: nn.Module, manifest: Manifest, registry: Any) -> nn.Module:
    """`install` for a model that its adapter has prepared."""
    # parents first, so that what lies inside a module finds it; handlers of one tap in their order
    for path, entry in sorted(manifest.modules.items(), key=lambda item: (item[0].count("."), natural(item[0]))):
        try:
            module = rebuild(registry.modules[entry.type], dict(entry.config), registry)
        except Exception as e:
            raise CheckpointError(f"{path or 'the model'}: {entry.type!r} cannot be rebuilt from its config ({type(e).__name__}: {e})") from e
        model = _placed(model, path, module)
    for path, original in manifest.shared.items():
        model = _placed(model, path, _submodule(model, original))
    return model


def tie(model: nn.Module, manifest: Manifest) -> None:
    """Make tied names one tensor again, in place."""
    for name, original in manifest.ties.items():
        value = _tensor(model, original)
        owner, own = _owner(model, name)
        slot: dict[str, Any] = owner._parameters if own in owner._parameters else owner._buffers
        if own not in slot or (not isinstance(value, nn.Parameter) and slot is owner._parameters):
            raise CheckpointError(f"{name} is tied to {original}, but the model has no such {'parameter' if slot is owner._parameters else 'buffer'}")
        slot[own] = value


def bind(model: nn.Module, manifest: Manifest, registry: Any, device: torch.device) -> None:
    """Choose the kernel of every module that runs one, in place."""
    if manifest.dtype not in DTYPES:
        raise CheckpointError(f"the manifest says dtype {manifest.dtype!r}; have: {', '.join(DTYPES)}")
    kernels = [kernel() for kernel in registry.kernels.values()]
    for path, module in model.named_modules():
        if path in manifest.modules and callable(choose := getattr(module, "bind", None)):
            choose(kernels, device, DTYPES[manifest.dtype])


def skeleton_of(folder: Path, manifest: Manifest, registry: Any) -> nn.Module:
    if not manifest.source:
        raise CheckpointError(f"{folder} does not say how its float architecture is built; pass it: load(folder, skeleton=model)")
    if manifest.source not in registry.sources:
        origin = manifest.origins.get("sources", {}).get(manifest.source)
        raise CheckpointError(
            f"{folder} is rebuilt by source {manifest.source!r}, which is not there: "
            + (f"pip install {origin}" if origin and origin != "qcore" else "install the plug-in that brings it")
            + ", or pass the float architecture: load(folder, skeleton=model)"
        )
    return registry.sources[manifest.source]().skeleton(folder)


def open_shards(folder: Path, manifest: Manifest) -> SafetensorsReader:
    """A reader over exactly the files that the manifest names; their sizes are compared first, because a cut file is the commonest damage."""
    if not manifest.files:
        raise CheckpointError(f"{folder / MANIFEST} names no weights file")
    for name, size in manifest.files.items():
        path = folder / name
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link; the files of a checkpoint lie in its folder: copy the file there")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; fetch the checkpoint again")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {size}: it is truncated or was changed, fetch it again")
    return SafetensorsReader(folder, [folder / name for name in manifest.files])


def check_fit(model: nn.Module, manifest: Manifest, reader: SafetensorsReader, folder: Path) -> None:
    """CheckpointError where names, shapes or dtypes of the stored tensors are not the model's; nothing but headers is read."""
    # what lies at the second path of a module is stored, and filled, under the first
    found = [entry for entry in owned_names(model, "") if not any(entry[0].startswith(path + ".") for path in manifest.shared)]
    expected = {name: (owner._parameters if is_param else owner._buffers)[own] for name, owner, own, is_param in found}
    # the float architecture's own tensors may be stored in another float dtype than it was built in; stored parts may not
    kept = {name for name, _, own, is_param in found if not is_param and name.removesuffix(own).rstrip(".") in manifest.modules}
    stored = set(reader.names())
    missing = sorted(set(expected) - stored - set(manifest.ties))
    unexpected = sorted(stored - set(expected))
    if missing or unexpected:
        parts = [f"{len(names)} {what}: {', '.join(names[:4])}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise CheckpointError(f"the tensors of {folder} do not fit the model; {'; '.join(parts)}\nis the skeleton of the same architecture?")
    for name, wanted in expected.items():
        if wanted is None or name in manifest.ties:
            continue
        there = reader.info(name)
        if there.shape != tuple(wanted.shape):
            raise CheckpointError(f"{folder}: {name} has shape {there.shape}, the model expects {tuple(wanted.shape)}")
        if name in kept and there.dtype != wanted.dtype:
            raise CheckpointError(f"{folder}: {name} is stored as {there.dtype}, the model expects {wanted.dtype}")


def _placed(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    try:
        place(model, path, module)
    except AttributeError as e:
        raise CheckpointError(f"the model has no place {path!r}, which the checkpoint names ({e}); is the skeleton of the same architecture?") from e
    return model


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as e:
        raise CheckpointError(f"the model has no module {path!r}, which the checkpoint names ({e}); is the skeleton of the same architecture?") from e


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, own = name.rpartition(".")
    return _submodule(model, parent), own


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, own = _owner(model, name)
    value = owner._parameters.get(own, owner._buffers.get(own))
    if value is None:
        raise CheckpointError(f"the model has no tensor {name!r}, which the checkpoint names")
    return value


def _unsaved_on_meta(model: nn.Module) -> list[str]:
    """Computed buffers without values: no file will bring them."""
    return [name for name, b in model.named_buffers() if b.is_meta and name not in missing_names(model)]
