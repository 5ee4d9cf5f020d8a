"""How a transformers folder or a GGUF file becomes a model.

Both give a skeleton whose parameters are on meta and a reader for the weights, one tensor at a time.  Where a file's names do not cover the model's
one to one (transformers renames, fuses or splits what some checkpoints hold), the whole model is loaded by transformers instead, and a note says so.
No checkpoint executes code: pickles are not opened, and a configuration that brings code of its own is refused.
"""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.errors import CheckpointError, NotFound, QcoreError
from qcore.model.reader import DictReader, SafetensorsReader, TensorReader
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from qcore.model.transformers_folder import RenamedReader, check_shapes, copy_files, first_line, read_config, require_float, whole_state
from torch import Tensor, nn

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_COMPANIONS = ("config.json", "generation_config.json", *_TOKENIZER_FILES)


class Tokens:
    """A transformers tokenizer, as what qcore asks of one: text to ids, without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids))


class TransformersFolder(ModelSource):
    """A folder that `save_pretrained` wrote: config.json and safetensors, perhaps a tokenizer."""

    name: ClassVar[str] = "transformers"
    help: ClassVar[str] = "path/to/folder       a transformers model: config.json and *.safetensors"

    def matches(self, uri: str) -> bool:
        return (Path(uri) / "config.json").is_file()

    def load(self, uri: str) -> LoadedModel:
        folder = Path(uri)
        data = read_config(folder)
        require_float(data, folder)
        reader = SafetensorsReader(folder)
        stored = reader.dtype()
        model = self.skeleton(folder)
        names = matching_names(model, set(reader.names()))
        notes: tuple[str, ...] = ()
        if names is None:
            weights: TensorReader = DictReader(whole_state(_auto_class(model.config)[0], folder, stored))
            notes = ("transformers converted the checkpoint's tensors while loading; the whole model was in memory",)
        else:
            check_shapes(model, reader, names, folder)
            weights = RenamedReader(reader, names)
        return LoadedModel(
            model=model,
            reader=weights,
            name=folder.resolve().name,
            dtype=stored,
            tokenizer=read_tokenizer(folder),
            source=self.name,
            write_companions=lambda target: copy_files(folder, target, _COMPANIONS),
            notes=notes,
        )

    def skeleton(self, folder: Path) -> nn.Module:
        data = read_config(folder)
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as e:  # transformers raises what it likes
            raise CheckpointError(f"{folder / 'config.json'}: transformers cannot read it ({first_line(e)})") from e
        # a checkpoint that qcore wrote says how it is quantized; its skeleton is the float architecture
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return skeleton_of(config, str(data.get("model_type")))

    def tokenizer(self, folder: Path) -> Any:
        return read_tokenizer(folder)


class NoWeights:
    """The reader of a model of which only the configuration is there: it knows every name, and has no tensor."""

    def __init__(self, where: Path, names: Iterable[str]) -> None:
        self._where, self._names = where, dict.fromkeys(names)

    def names(self) -> Iterable[str]:
        return self._names.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        raise CheckpointError(f"{self._where} is a configuration alone, there is no {name}: `qcore plan` needs no weights, everything else does")


class TransformersConfig(ModelSource):
    """One .json file that says what a model is made of: enough to plan a run on a model that is not there."""

    name: ClassVar[str] = "transformers-config"
    help: ClassVar[str] = "path/to/config.json  a transformers configuration without weights, for `qcore plan`"

    def matches(self, uri: str) -> bool:
        return uri.endswith(".json") and Path(uri).is_file()

    def load(self, uri: str) -> LoadedModel:
        path = Path(uri)
        data = read_config(path)
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as e:  # transformers raises what it likes
            raise CheckpointError(f"{path}: transformers cannot read it ({first_line(e)})") from e
        model = skeleton_of(config, str(data["model_type"]))
        named = data.get("dtype") or data.get("torch_dtype") or "bfloat16"
        return LoadedModel(
            model=model,
            reader=NoWeights(path, model.state_dict(keep_vars=True)),
            name=path.parent.resolve().name if path.name == "config.json" else path.stem,
            dtype=getattr(torch, str(named).removeprefix("torch."), torch.bfloat16),
            source=self.name,
            notes=("there are no weights: all that can be done with a configuration is a plan",),
        )


class GGUF(ModelSource):
    """One .gguf file: weights are dequantized tensor by tensor, names and configuration are translated by transformers' own tables."""

    name: ClassVar[str] = "gguf"
    help: ClassVar[str] = "path/to/model.gguf   a GGUF file of an architecture that transformers can read"

    def matches(self, uri: str) -> bool:
        return uri.endswith(".gguf") and Path(uri).is_file()

    def load(self, uri: str) -> LoadedModel:
        if find_spec("gguf") is None:
            raise NotFound(f"{uri}: GGUF files are read with the package gguf, which is not installed: pip install gguf")
        from qplug_llm import gguf

        path = Path(uri)
        file = gguf.GGUFFile(path)
        config = gguf.config_of(file)
        model = skeleton_of(config, file.architecture)
        config.architectures = [type(model).__name__]
        reader: TensorReader
        notes: tuple[str, ...] = ()
        if types := file.quantized_types():
            notes += (f"weights are dequantized {', '.join(types)}",)
        translated = gguf.GGUFReader.translate(file, model)
        if translated is None:
            reader = DictReader(gguf.loaded_by_transformers(path))
            notes += ("transformers converted the file's tensors while loading; the whole model was in memory",)
        else:
            reader = translated
        tokenizer = gguf.tokenizer_of(path)

        def write(target: Path) -> None:
            config.save_pretrained(target)
            tokenizer.save_pretrained(target)

        return LoadedModel(
            model=model,
            reader=reader,
            name=path.stem,
            dtype=file.dtype(),
            tokenizer=Tokens(tokenizer),
            source=TransformersFolder.name,  # its checkpoints are folders with a config.json
            write_companions=write,
            notes=notes,
        )


def skeleton_of(config: Any, kind: str) -> nn.Module:
    """The model of a configuration, parameters on meta, in evaluation mode: without a head where its `architectures` name none, else causal."""
    auto, what = _auto_class(config)
    try:
        with parameters_on_meta():
            model = auto.from_config(config, trust_remote_code=False)
    except Exception as e:  # transformers raises what it likes
        raise CheckpointError(f"transformers makes no {what} of {kind!r} ({first_line(e)})") from e
    return model.eval()


def _auto_class(config: Any) -> tuple[Any, str]:
    """The class of transformers that makes the model, and what it is called in messages."""
    from transformers import AutoModel, AutoModelForCausalLM

    named = getattr(config, "architectures", None) or []
    bare = bool(named) and all(str(n).endswith("Model") and not str(n).endswith("HeadModel") for n in named)
    return (AutoModel, "model without a head") if bare else (AutoModelForCausalLM, "causal language model")


def matching_names(model: nn.Module, stored: set[str]) -> dict[str, str] | None:
    """Model name → stored name for every parameter and persistent buffer, or None where they do not match one to one.

    Tied parameters may be stored once; a base model's file lacks the model's prefix, or has it where the model does not.
    """
    wanted = list(model.state_dict(keep_vars=True))
    same: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        same.setdefault(id(value), []).append(name)
    ties = {name: group for group in same.values() for name in group}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name in wanted:
        options = [n for tied in ties[name] for n in (tied, tied.removeprefix(prefix), prefix + tied)]
        hit = next((n for n in dict.fromkeys(options) if n in stored), None)
        if hit is None:
            return None
        found[name] = hit
    spare = stored - set(found.values())
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    # tables that are computed anew: rotary frequencies, causal masks
    known = ("inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
    spare = {n for n in spare if not n.endswith(known) and not any(re.search(p, n) for p in ignored)}
    return None if spare else found


def read_tokenizer(folder: Path) -> Tokens | None:
    """The folder's tokenizer; None when it has none."""
    if not any((folder / f).is_file() for f in _TOKENIZER_FILES if f.startswith(("tokenizer", "vocab", "spiece"))):
        return None
    from transformers import AutoTokenizer

    try:
        return Tokens(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except QcoreError:
        raise
    except Exception as e:  # transformers raises what it likes
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({first_line(e)}); fetch its files again") from e
