"""Write a checkpoint, or nothing: all files go to a temporary sibling folder, which takes the target's name at the very end."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcore.checkpoint.layout import Layout, compressed_tensors_config, layout_for, model_dtype
from qcore.checkpoint.manifest import MANIFEST, Manifest, ModuleEntry, content_hash, natural, needed_names, origins_of
from qcore.errors import CheckpointError
from qcore.model.reader import TensorReader
from qcore.model.safetensors_file import write_safetensors
from qcore.model.tap import Tap, TapChain
from qcore.modules import StoredWeight, module_name, serve_in
from qcore.modules.online import Online
from qcore.modules.stored import resolved

SHARD_BYTES = 4_000_000_000
_STEM = {"compressed-tensors": "model", "qcore": "model.qcore"}
# transformers looks for these names, with and without variant="qcore"
_INDEX = {"compressed-tensors": "model.safetensors.index.json", "qcore": "model.safetensors.index.qcore.json"}


def save(
    model: nn.Module,
    folder: Path | str,
    *,
    source: str = "",
    adapter: str = "",
    companions: Callable[[Path], None] | None = None,
    dtype: torch.dtype | None = None,
    record: Mapping[str, Any] | None = None,
    registry: Any = None,
    overwrite: bool = False,
    values: TensorReader | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Write `model`, whose leaves were replaced by run-time modules, to `folder`.

    source:     the ModelSource whose `skeleton` rebuilds the float architecture; "" = whoever loads passes it
    adapter:    the ModelAdapter whose `prepare` the model went through
    companions: writes config.json, tokenizer files … into a folder (`LoadedModel.write_companions`)
    dtype:      in which the model is stored and served; `model` is converted to it in place first, so that both stay the same model.  None = as it is
    record:     JSON-ready: recipe, seed, data hash, coverage
    overwrite:  replace what is in `folder`; else a folder with content is an error
    values:     the tensors that the model has on meta (`Quantized.values`), read one at a time while they are written

    CheckpointError when it cannot be written; then `folder` is as it was.
    """
    folder, registry = Path(folder), resolved(registry)
    with _built_beside(folder, overwrite) as building:
        if companions is not None:
            companions(building)
        config = _read_config(building)
        if dtype is not None:
            serve_in(model, dtype)
        layout = layout_for(model, registry.modules)
        if layout.name == "compressed-tensors" and config is None:
            layout = Layout("qcore", ("there is no config.json, so transformers could not load it",))
        entries, shared = _entries(model, registry)
        tensors, ties = _tensors(model, shared, values)
        files = _write_shards(tensors, building, layout, shard_bytes, values)
        needs = needed_names(entries.values())
        needs["adapters"] |= {adapter} - {""}
        needs["sources"] |= {source} - {""}
        manifest = Manifest(
            layout=layout.name,
            modules=entries,
            shared=shared,
            ties=ties,
            dtype=model_dtype(model),
            source=source,
            adapter=adapter,
            origins=origins_of(needs, registry),
            files=files,
            sha256={file: content_hash(building / file) for file in files},
            record=dict(record or {}) | {"layout_reasons": list(layout.reasons[:8])},
        )
        manifest.write(building)
        if config is not None:
            _write_config(building, config, model, manifest)
        if not (building / "README.md").exists():
            (building / "README.md").write_text(_card(model, manifest), encoding="utf-8")
    return manifest


def _entries(model: nn.Module, registry: Any) -> tuple[dict[str, ModuleEntry], dict[str, str]]:
    """(entries by path, path → the path of the same module).  What lies below a second path of a module needs no mention of its own."""
    entries: dict[str, ModuleEntry] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for path, m in model.named_modules(remove_duplicate=False):
        name = module_name(m, registry.modules)
        if name is None:
            _not_left_behind(path, m)
        if name is None or any(path.startswith(alias + ".") for alias in shared):
            continue
        if id(m) in first:
            shared[path] = first[id(m)]
            continue
        first[id(m)] = path
        config = m.config()
        try:
            json.dumps(config)
        except (TypeError, ValueError) as e:
            raise CheckpointError(f"{path}: the config of {name!r} is not plain data ({e}); mend its `config`") from e
        entries[path] = ModuleEntry(name, config)
    return entries, shared


def _not_left_behind(path: str, module: nn.Module) -> None:
    """CheckpointError for what a checkpoint cannot rebuild: a module before a leaf that stayed float, an observer that is still attached."""
    if isinstance(module, Online):
        before = type(module.before).__name__
        raise CheckpointError(
            f"{path}: {before} stands before a layer that is not quantized; quantize it, or leave out the transform that put it there"
        )
    if isinstance(module, Tap) and not isinstance(module, TapChain):
        raise CheckpointError(f"{path}: {type(module).__name__} is attached, but no registered module; detach it before saving")


def _tensors(model: nn.Module, shared: Mapping[str, str], values: TensorReader | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors to store, name → the name that stores it too).  Those on meta must be in `values`."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if any(name.startswith(alias + ".") for alias in shared):
            continue
        if not isinstance(t, Tensor):
            raise CheckpointError(f"{name} is a {type(t).__name__} in the state dict; a checkpoint holds tensors alone")
        if t.is_meta and (values is None or name not in values):
            raise CheckpointError(f"{name} has no values (it is on meta); materialize the model before saving it")
        key = (id(t),) if t.is_meta else (t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)
        if t.numel() and key in seen:
            ties[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = t.detach()
    return tensors, ties


def _write_shards(tensors: Mapping[str, Tensor], folder: Path, layout: Layout, shard_bytes: int, values: TensorReader | None) -> dict[str, int]:
    """Write the tensors; returns file → bytes."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    # by name, layer 9 before layer 10: a module may hold its children in another order after a resumed run
    for name in sorted(tensors, key=natural):
        t = tensors[name]
        size = t.numel() * t.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = t
        room -= size
    stem = _STEM[layout.name]
    names = [f"{stem}.safetensors"] if len(shards) == 1 else [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

    def value(name: str) -> Tensor:
        t = tensors[name]
        return values[name].to(t.dtype) if t.is_meta and values is not None else t

    for file, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file, shard, {"format": "pt"}, value)
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: f for f, s in zip(names, shards, strict=True) for n in s}}
        (folder / _INDEX[layout.name]).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return {file: (folder / file).stat().st_size for file in names}


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return config


def _write_config(folder: Path, config: dict[str, Any], model: nn.Module, manifest: Manifest) -> None:
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")} | {"dtype": manifest.dtype}
    if manifest.layout == "compressed-tensors":
        quantization = compressed_tensors_config(model)
    else:
        # the loader inside transformers sees config.json alone
        quantization = {"quant_method": "qcore", "manifest": manifest.to_dict() | {"files": {}, "sha256": {}, "record": {}}}
    if quantization is not None:
        config["quantization_config"] = quantization
    first, last = (_end(model, name) for name in ("get_input_embeddings", "get_output_embeddings"))
    if first is not None and last is not None:
        # what a transform or a solver untied must not be tied again by the loader, over the weight that was stored
        config["tie_word_embeddings"] = _same_weight(first, last)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _end(model: nn.Module, name: str) -> Any:
    """The module that a transformers model names so, or None; a model of two towers says that it names none."""
    try:
        return end() if callable(end := getattr(model, name, None)) else None
    except NotImplementedError:
        return None


def _same_weight(a: nn.Module, b: nn.Module) -> bool:
    if a is b:
        return True
    one, other = getattr(a, "weight", None), getattr(b, "weight", None)
    plain = not isinstance(a, StoredWeight) and not isinstance(b, StoredWeight)
    return plain and isinstance(one, Tensor) and isinstance(other, Tensor) and one.data_ptr() == other.data_ptr()


def _card(model: nn.Module, manifest: Manifest) -> str:
    """A short model card: how to load it, and what is stored."""
    counts: dict[str, int] = {}
    for m in model.modules():
        if isinstance(m, StoredWeight):
            what = f"{m.spec}, packed as {m.packing.name}"
            counts[what] = counts.get(what, 0) + 1
    rows = "\n".join(f"| {n} | {what} |" for what, n in sorted(counts.items())) or "| 0 | nothing is quantized |"
    kind = type(model).__name__
    if manifest.layout == "compressed-tensors":
        load = f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained(folder)"
        note = "Any program that reads compressed-tensors loads it; so does `qcore.checkpoint.load(folder)`."
    else:
        load = "from qcore.checkpoint import load\n\nmodel = load(folder)"
        note = (
            'This layout needs qcore.  With transformers: `import qcore.hf`, then `from_pretrained(folder, variant="qcore")`; without the import it '
            "refuses, because there is no file `model.safetensors`."
        )
    return (
        f"# A quantized {kind}\n\n```python\n{load}\n```\n\n{note}\n\n| layers | stored as |\n|---|---|\n{rows}\n\n"
        f"`{MANIFEST}` says what each module is and how it was made; `proof.json`, where there is one, says that it was loaded and compared.\n"
        f"Written by qcore {manifest.written_by}.\n"
    )


@contextmanager
def _built_beside(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `folder` to build in; on success it takes `folder`'s place, on any failure it is gone."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(f"{folder} is not empty; choose another folder, or pass overwrite=True to replace it")
    building: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        building.chmod(0o755)
        yield building
        for path in sorted(building.rglob("*")):
            _sync(path)
        _sync(building)
        _take_place(building, folder)
        _sync(folder.parent)
    except OSError as e:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {e}; nothing was left behind") from e
    finally:
        if building is not None and building.exists():
            shutil.rmtree(building, ignore_errors=True)


def _take_place(building: Path, folder: Path) -> None:
    """Rename `building` to `folder`; what was there goes only after the new one stands."""
    old: Path | None = None
    if folder.is_dir() and any(folder.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
        folder.rename(old)
    try:
        building.rename(folder)
    except OSError:
        if old is not None:
            old.rename(folder)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
