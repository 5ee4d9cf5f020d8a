"""What sources of transformers folders share: a configuration that brings no code, tensors under other names, shapes that belong to it, companions.

Nothing here imports transformers; what needs it is given the class that loads.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcore.errors import CheckpointError, NotFound
from qcore.model.reader import SafetensorsReader, TensorReader, weights_fingerprint


class RenamedReader:
    """A reader whose tensors are known by other names.  names: name here → name there; two may lead to one (tied parameters)"""

    def __init__(self, reader: TensorReader, names: Mapping[str, str]) -> None:
        self._reader, self._names = reader, dict(names)

    def names(self) -> Iterable[str]:
        return self._names.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise NotFound(f"no tensor named {name!r}; there are {len(self._names)}, such as {', '.join(list(self._names)[:3])}")
        return self._reader[self._names[name]]

    def fingerprint(self) -> str:
        return weights_fingerprint(self._reader)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, or the file itself; refused when it is broken or brings code."""
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise NotFound(f"{folder} has no config.json") from e
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}); fetch it again") from e
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise CheckpointError(f"{path} names no model_type; it is not the configuration of a transformers model")
    if "auto_map" in data:
        raise CheckpointError(
            f"{path} asks for code of its own (auto_map: {', '.join(map(str, data['auto_map']))}); a checkpoint never executes code here\n"
            f"if transformers has {data['model_type']!r} built in and it computes the same, remove the auto_map entry"
        )
    return data


def require_float(data: Mapping[str, Any], folder: Path) -> None:
    """CheckpointError where a configuration says that the weights are quantized."""
    if "quantization_config" in data:
        how = (data["quantization_config"] or {}).get("quant_method", "an unnamed method")
        raise CheckpointError(
            f"{folder} is quantized already ({how}); quantizing it again would add a second error to the first: load the float model it was made from"
        )


def check_shapes(model: nn.Module, reader: SafetensorsReader, names: Mapping[str, str], folder: Path) -> None:
    """CheckpointError where a stored tensor has another shape than the configuration says."""
    for name, value in model.state_dict(keep_vars=True).items():
        there = list(reader.info(names[name]).shape)
        if there != list(value.shape):
            raise CheckpointError(
                f"{folder}: {names[name]} is {there}, config.json asks for {list(value.shape)}; weights and configuration are of different models"
            )


def whole_state(loads: Any, folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a folder whose names do not lead to the model's one by one, as transformers converts them; the whole model is in memory.

    loads: the class with the `from_pretrained` that loads it
    CheckpointError where transformers cannot, or where tensors are missing, left over, or of other shapes.
    """
    try:
        model, info = loads.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except Exception as e:  # transformers raises what it likes
        raise CheckpointError(f"{folder}: transformers cannot load it ({first_line(e)})") from e
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            raise CheckpointError(
                f"{folder}: {len(keys)} {kind.replace('_keys', '')} tensors, such as {keys[0]}; the weights do not belong to this config.json, "
                "and what is missing would be random"
            )
    return {name: value.detach() for name, value in model.state_dict().items()}


def copy_files(folder: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the named files that are there: configuration and tokenizer, nothing that could be executed."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def first_line(e: Exception) -> str:
    """An error of a library in short."""
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:200] if lines else ''}"
