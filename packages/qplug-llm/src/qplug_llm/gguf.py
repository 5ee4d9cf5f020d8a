"""GGUF files, read lazily: the header at once, each tensor when it is asked for.

The header is parsed here: gguf-py's own reader takes seven seconds for a vocabulary of 49,152 tokens, which nobody needs to load a weight.
Everything that is knowledge stays with its owner: gguf-py dequantizes blocks and names tensors, transformers translates configurations, names and
layouts (the rotary permutation of q and k among them).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qcore.errors import CheckpointError, NotFound
from torch import Tensor, nn

_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST = 4  # arrays in arrays; no writer makes more than two
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its shape in torch's order, its ggml type's name, and its bytes from the file's start."""

    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


class _Cursor:
    """Reads values one after the other and never past the end."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def skip(self, n: int) -> int:
        if n < 0 or self.at + n > len(self.data):
            raise CheckpointError(
                f"{self.path}: the header ends in the middle of a value (byte {self.at}); the file is truncated or corrupt, fetch it again"
            )
        self.at += n
        return self.at - n

    def one(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        n = self.one("Q")
        at = self.skip(n)
        return bytes(self.data[at : at + n]).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """One metadata value; arrays of numbers as NumPy arrays, which take no more memory than the file."""
        if kind in _FIXED:
            return self.one(_FIXED[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: metadata of unknown type {kind} at byte {self.at}; the file is corrupt, or newer than this reader")
        inner, count = self.one("I"), self.one("Q")
        if inner in _FIXED:
            code = _FIXED[inner]
            at = self.skip(count * struct.calcsize("<" + code))
            return np.frombuffer(self.data, dtype=np.dtype(f"<{code}"), count=count, offset=at).copy()
        if depth == _DEEPEST:
            raise CheckpointError(f"{self.path}: metadata of arrays in arrays, more than {_DEEPEST} deep, at byte {self.at}; the file is corrupt")
        if count > len(self.data):
            self.skip(len(self.data))
        return [self.value(inner, depth + 1) for _ in range(count)]


class GGUFFile:
    """Metadata and the table of tensors of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, mode="r", dtype=np.uint8)
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path} cannot be opened ({e})") from e
        cursor = _Cursor(self._bytes.data, path)
        if bytes(self._bytes[:4]) != b"GGUF":
            raise CheckpointError(f"{path} does not begin with 'GGUF': it is no GGUF file")
        cursor.skip(4)
        version, tensors, pairs = cursor.one("I"), cursor.one("Q"), cursor.one("Q")
        if version not in (2, 3):
            raise CheckpointError(f"{path} is GGUF version {version}; versions 2 and 3, little endian, can be read")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.one("I"))
        if not isinstance(self.metadata.get("general.architecture"), str):
            raise CheckpointError(f"{path} names no architecture in its metadata")
        self.architecture: str = self.metadata["general.architecture"]
        table = []
        for _ in range(tensors):
            name = cursor.string()
            shape = tuple(reversed([cursor.one("Q") for _ in range(cursor.one("I"))]))
            table.append((name, shape, cursor.one("I"), cursor.one("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1:
            raise CheckpointError(f"{path}: general.alignment is {alignment!r}, which is no positive number; the file is corrupt")
        begin = -(-cursor.at // alignment) * alignment
        self.tensors = {name: self._entry(name, shape, kind, begin + offset) for name, shape, kind, offset in table}

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> Entry:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            ggml = GGMLQuantizationType(kind)
        except ValueError as e:
            raise CheckpointError(f"{self.path}: {name} is of ggml type {kind}, which the installed gguf package does not know; update it") from e
        block, size = GGML_QUANT_SIZES[ggml]
        if 0 in shape:
            raise CheckpointError(f"{self.path}: {name} has shape {shape}, which holds nothing; the file is corrupt")
        if not shape or shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: {name} has shape {shape}, rows must be a multiple of {ggml.name}'s block of {block}; the file is corrupt"
            )
        total = prod(shape) // block * size
        if start + total > len(self._bytes):
            raise CheckpointError(
                f"{self.path}: {name} ends at byte {start + total:,}, the file at {len(self._bytes):,}; it is truncated, fetch it again"
            )
        return Entry(shape, ggml.name, start, total)

    def quantized_types(self) -> tuple[str, ...]:
        """Names of the block formats in the file, the one with most weights first."""
        counts: dict[str, int] = {}
        for entry in self.tensors.values():
            if entry.kind not in _FLOATS:
                counts[entry.kind] = counts.get(entry.kind, 0) + prod(entry.shape)
        return tuple(sorted(counts, key=lambda kind: -counts[kind]))

    def dtype(self) -> torch.dtype:
        """The half type of a float file; float32 when weights are dequantized."""
        kinds = {entry.kind for entry in self.tensors.values()}
        return next((_FLOATS[k] for k in ("BF16", "F16") if k in kinds), torch.float32) if kinds <= set(_FLOATS) else torch.float32

    def values(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        entry = self.tensors[name]
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[entry.kind]]
        raw = self._bytes[entry.start : entry.start + entry.size]
        if entry.kind == "F32":
            return np.array(raw.view(np.float32)).reshape(entry.shape)
        if entry.kind == "F16":
            return raw.view(np.float16).astype(np.float32).reshape(entry.shape)
        try:
            rows = np.array(raw).reshape(*entry.shape[:-1], entry.shape[-1] // block * size)
            return dequantize(rows, GGMLQuantizationType[entry.kind]).reshape(entry.shape)
        except NotImplementedError as e:
            raise CheckpointError(f"{self.path}: {name} is {entry.kind}, which gguf-py cannot dequantize") from e


class _Names:
    """What `get_gguf_hf_weights_map` asks of a model, without its submodules."""

    def __init__(self, model: nn.Module) -> None:
        self.config, self._names = model.config, dict.fromkeys(model.state_dict())

    def state_dict(self) -> dict[str, None]:
        return self._names

    def named_children(self) -> tuple[()]:
        return ()


class GGUFReader:
    """A file's tensors under the model's names, in the model's layout, float32 or the file's own half type."""

    def __init__(self, file: GGUFFile, names: Mapping[str, str], processor: Any) -> None:
        self._file, self._names, self._processor = file, dict(names), processor
        self._dtype = file.dtype()

    @classmethod
    def translate(cls, file: GGUFFile, model: nn.Module) -> "GGUFReader | None":
        """None where one tensor of the model is made of several in the file, or transformers has another way for this architecture."""
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        if file.architecture not in GGUF_SUPPORTED_ARCHITECTURES:
            return None
        processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())  # type: ignore[union-attr,operator]
        try:
            # the model's own names; asking for those of every submodule too, as transformers does, takes a quarter of a minute
            known = get_gguf_hf_weights_map(_Names(model), processor)
        except NotImplementedError:
            return None
        names: dict[str, str] = {}
        for stored, name in known.items():
            if stored not in file.tensors:
                continue
            if name in names:
                return None
            names[name] = stored
        by_id: dict[int, str] = {}
        state = model.state_dict(keep_vars=True)
        for name, value in state.items():
            if name in names:
                by_id.setdefault(id(value), names[name])
        for name, value in state.items():
            if name not in names and id(value) in by_id:
                names[name] = by_id[id(value)]  # tied
        if set(names) != set(state):
            return None
        return cls(file, names, processor)

    def names(self) -> Iterable[str]:
        return self._names.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise NotFound(f"{self._file.path} has no tensor for {name!r}")
        stored = self._names[name]
        rest: dict[str, dict[str, Tensor]] = {"tensors": {}}
        done = self._processor.process(weights=self._file.values(stored), name=stored, tensor_key_mapping={stored: name}, parsed_parameters=rest)
        # some processors put a tensor where they want it and return no name
        value = rest["tensors"].get(name) if done.name is None else torch.from_numpy(np.ascontiguousarray(done.weights))
        if value is None:
            raise CheckpointError(f"{self._file.path}: transformers has no plain conversion for {stored!r}")
        return value.to(self._dtype)


def config_of(file: GGUFFile) -> Any:
    """The transformers configuration of a file."""
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    table: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    plain = table.get(file.architecture)
    data: dict[str, Any] = {}
    if plain is not None and _is_plain(file):
        data |= {"model_type": file.architecture, "tie_word_embeddings": "output.weight" not in file.tensors}
        for key, value in file.metadata.items():
            prefix, _, rest = key.partition(".")
            if prefix == file.architecture and plain.get(rest) not in (None, -1):
                listed = value.tolist() if isinstance(value, np.ndarray) else value
                data[plain[rest]] = listed[0] if isinstance(listed, list) and len(listed) == 1 else listed
        for key, own in (("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id"), ("padding_token_id", "pad_token_id")):
            if (value := file.metadata.get(f"tokenizer.ggml.{key}")) is not None:
                data[own] = value
        tokens = file.metadata.get("tokenizer.ggml.tokens", ())
        data.setdefault("vocab_size", len(tokens) if isinstance(tokens, list) else 0)
    try:
        if data:
            return AutoConfig.for_model(**data)
        return AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name, local_files_only=True)
    except Exception as e:  # transformers raises what it likes
        raise CheckpointError(f"{file.path}: transformers cannot read architecture {file.architecture!r} from GGUF ({type(e).__name__}: {e})") from e


def _is_plain(file: GGUFFile) -> bool:
    """Whether transformers' table alone makes the configuration; its reader has special cases for the others, and is asked then (slowly)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return (
        file.architecture in ("llama", "qwen2", "qwen3", "phi3", "gpt2", "gemma2")
        and file.architecture in CONFIG_MAPPING
        and file.metadata.get("general.name") != "mistral"
    )


def tokenizer_of(path: Path) -> Any:
    """The tokenizer in the file, by the class that every fast tokenizer is; AutoTokenizer would parse the file twice more to choose it."""
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as e:  # transformers raises what it likes
        raise CheckpointError(f"{path}: the tokenizer in the file cannot be read ({type(e).__name__}: {e})") from e


def loaded_by_transformers(path: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as e:  # transformers raises what it likes
        raise CheckpointError(f"{path}: transformers cannot load it ({type(e).__name__}: {e})") from e
    return {name: value.detach() for name, value in model.state_dict().items()}
