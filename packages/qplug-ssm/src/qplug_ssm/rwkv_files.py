"""How RWKV checkpoints become models: .pth as published (opened with weights_only=True), one .safetensors file, or a folder with a config.json.

The version is read off the tensors' names.  Names are those of the published files; `.mu` is added to element-wise vectors and taken away again.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar
from zipfile import is_zipfile

import torch
from qcore.errors import CheckpointError, NotFound
from qcore.model.reader import DictReader, SafetensorsReader, TensorReader
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from torch import Tensor, nn

from qplug_ssm.rwkv_tokens import read_tokenizer, tokenizer_file

_KINDS = ("rwkv7", "rwkv6")


class RWKVFiles(ModelSource):
    """RWKV-6 and RWKV-7."""

    name: ClassVar[str] = "rwkv"
    help: ClassVar[str] = (
        "path/to/RWKV.pth     RWKV-6 or RWKV-7 as published (.pth, .safetensors), or a folder with a config.json of model_type rwkv6, rwkv7"
    )
    priority: ClassVar[int] = 1

    def matches(self, uri: str) -> bool:
        path = Path(uri)
        if path.is_file():
            return path.suffix in (".pth", ".safetensors")
        return _model_type(path) in _KINDS

    def load(self, uri: str) -> LoadedModel:
        path = Path(uri)
        pickled = path.is_file() and path.suffix == ".pth"
        stored: TensorReader = DictReader(read_pth(path)) if pickled else SafetensorsReader(path)
        config = None if path.is_file() else read_config(path)
        shapes = {name: tuple(stored[name].shape) for name in stored.names()} if config is None else {}
        if config is None:
            config = config_of(shapes, path)
        model = build(config)
        reader = RWKVReader(stored, model, path)
        dtypes = {stored[f"blocks.0.att.{n}.weight"].dtype for n in ("key", "value")}
        tokens = tokenizer_file(path if path.is_dir() else path.parent, config.vocab_size)

        def write(target: Path) -> None:
            target.mkdir(parents=True, exist_ok=True)
            (target / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
            if tokens is not None:
                (target / tokens.name).write_bytes(tokens.read_bytes())

        return LoadedModel(
            model=model,
            reader=reader,
            name=path.resolve().stem if path.is_file() else path.resolve().name,
            dtype=dtypes.pop(),
            tokenizer=read_tokenizer(tokens),
            source=self.name,
            write_companions=write,
        )

    def skeleton(self, folder: Path) -> nn.Module:
        return build(read_config(folder))

    def tokenizer(self, folder: Path) -> Any:
        return read_tokenizer(tokenizer_file(folder))


class RWKVReader:
    """Tensors of a published checkpoint under the names and shapes of our modules.

    Left out: `att.v0`, `v1`, `v2` of layer 0, which published RWKV-7 files hold and nobody reads.
    """

    def __init__(self, stored: TensorReader, model: nn.Module, where: Path) -> None:
        self._stored = stored
        there = set(stored.names())
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._names = {name: name if name in there else name.removesuffix(".mu") for name in self._shapes}
        if missing := sorted(n for n in self._names.values() if n not in there):
            raise CheckpointError(
                f"{where}: {len(missing)} tensors are missing, such as {missing[0]!r}; it is truncated, or of another version of RWKV"
            )
        spare = sorted(there - set(self._names.values()) - {f"blocks.0.att.v{i}" for i in range(3)})
        if spare:
            raise CheckpointError(f"{where}: nobody reads {len(spare)} of its tensors, such as {spare[0]!r}; this variant of RWKV is not known")
        for name, own in self._names.items():
            got = tuple(stored[own].shape)
            if torch.Size(got).numel() != torch.Size(self._shapes[name]).numel() or (len(self._shapes[name]) > 1 and got != self._shapes[name]):
                raise CheckpointError(f"{where}: {own} is {list(got)}, expected {list(self._shapes[name])}; weights and configuration differ")

    def names(self) -> Iterable[str]:
        return self._names.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise NotFound(f"no tensor named {name!r}; there are {len(self._names)}, such as {', '.join(list(self._names)[:3])}")
        return self._stored[self._names[name]].reshape(self._shapes[name])


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a published .pth; nothing in it is executed."""
    try:
        # files from before torch 1.6 are no zip archives, and cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as e:  # pickle, zip and torch raise what they like
        first = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
        raise CheckpointError(f"{path} cannot be read as plain tensors ({first}); it is corrupt, or wants to execute code, which is refused") from e
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} holds something else than a dictionary of tensors; it is no published RWKV checkpoint")
    return tensors


def config_of(shapes: Mapping[str, tuple[int, ...]], where: Path) -> Any:
    """The configuration that a checkpoint's tensors imply; CheckpointError for other versions, named by what gave them away."""
    names = set(shapes)
    try:
        if "blocks.0.att.r_k" in names:
            from qplug_ssm import rwkv7

            return rwkv7.sizes_of(shapes)
        if "blocks.0.att.time_maa_x" in names:
            from qplug_ssm import rwkv6

            return rwkv6.sizes_of(shapes)
    except (KeyError, ValueError) as e:
        raise CheckpointError(f"{where}: it looks like RWKV, but its sizes cannot be read off ({type(e).__name__}: {e})") from e
    known = "RWKV-6 ('att.time_maa_x') and RWKV-7 ('att.r_k') are read; RWKV-4 comes as a transformers folder"
    if "blocks.0.att.ln_x.weight" in names:
        raise CheckpointError(f"{where} is RWKV-5 ('att.ln_x', no 'att.time_maa_x'), which is not known here; {known}")
    if "blocks.0.att.time_mix_k" in names:
        raise CheckpointError(
            f"{where} is RWKV-4 in its own layout ('att.time_mix_k'); convert it with transformers' convert_rwkv_checkpoint_to_hf; {known}"
        )
    raise CheckpointError(f"{where} is no RWKV checkpoint of a known version: it holds {', '.join(sorted(names)[:3])} …; {known}")


def build(config: Any) -> nn.Module:
    """The model of a configuration, parameters on meta, in evaluation mode."""
    from qplug_ssm.rwkv6 import RWKV6
    from qplug_ssm.rwkv7 import RWKV7

    with parameters_on_meta():
        return (RWKV7 if config.model_type == "rwkv7" else RWKV6)(config).eval()


def read_config(folder: Path) -> Any:
    """`config.json` as a configuration; CheckpointError where it is of another kind."""
    from qplug_ssm.rwkv6 import RWKV6Config
    from qplug_ssm.rwkv7 import RWKV7Config

    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise NotFound(f"{folder} has no config.json") from e
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}); fetch it again") from e
    kinds = {"rwkv7": RWKV7Config, "rwkv6": RWKV6Config}
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind not in kinds:
        raise CheckpointError(f"{path} is of model_type {kind!r}; versions of RWKV known here: {', '.join(kinds)}")
    known = {f.name for f in fields(kinds[kind])}
    for written_by_qcore in ("quantization_config", "dtype"):
        data.pop(written_by_qcore, None)
    if unknown := sorted(set(data) - known):
        raise CheckpointError(f"{path} has an unknown field {unknown[0]!r}; {kind} has: {', '.join(sorted(known))}")
    try:
        return kinds[kind](**data)
    except TypeError as e:
        raise CheckpointError(f"{path}: {e}") from e


def _model_type(folder: Path) -> str | None:
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data.get("model_type") if isinstance(data, dict) else None
