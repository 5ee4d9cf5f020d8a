"""What a run has finished, on disk, so that a killed run goes on where it was.

    run folder/
      run.json                  what the run is made of: weights, data, recipe, versions; a run with another content is refused
      rewrite.safetensors .json what the model-wide transforms found
      block-00003.safetensors   the finished block: packed parts, remaining parameters
      block-00003.json          its modules' types and configs, its records, the edits of its own transforms
      inputs-00004.safetensors  what the next block reads (that of earlier blocks is deleted)

A block is finished when its json lies there: it is written last, and every file is written beside, flushed, and renamed.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcore.errors import CheckpointError


def content_hash(data: Any) -> str:
    """A short fingerprint of JSON-ready data; the same data gives the same one on every machine."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """A fingerprint of names, shapes, dtypes and bytes."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().contiguous()
        h.update(f"{name}|{tuple(t.shape)}|{t.dtype}|".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return h.hexdigest()[:16]


class Journal:
    """The run folder of one quantization.

    content: JSON-ready description of all that decides the result; CheckpointError when the folder holds a run with another one
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        there = _read_json(folder / "run.json") if (folder / "run.json").exists() else None
        wanted = json.loads(json.dumps(content, sort_keys=True))
        if there is None:
            _write_json(folder / "run.json", wanted)
        elif there != wanted:
            differing = [k for k in sorted(set(there) | set(wanted)) if there.get(k) != wanted.get(k)]
            lines = "\n".join(f"  {k}: the run has {there.get(k)!r}, now {wanted.get(k)!r}" for k in differing)
            raise CheckpointError(f"{folder} holds a run made of something else; resume with the same, or delete the folder\n{lines}")

    # the transforms of the whole model ---------------------------------------------------------------------------------------------------

    def rewrite(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The journalled model-wide rewrite as (tensors, data), or None when that step was not finished."""
        if not (self.folder / "rewrite.json").exists():
            return None
        return self._tensors("rewrite"), _read_json(self.folder / "rewrite.json")

    def keep_rewrite(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        self._keep("rewrite", tensors, data)

    # blocks ------------------------------------------------------------------------------------------------------------------------------

    def finished(self, blocks: int) -> int:
        """How many blocks, counted from the first, are finished."""
        done = 0
        while done < blocks and (self.folder / f"block-{done:05}.json").exists():
            done += 1
        return done

    def block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        name = f"block-{index:05}"
        return self._tensors(name), _read_json(self.folder / f"{name}.json")

    def inputs(self, index: int) -> list[Tensor]:
        """The hidden states that block `index` reads, one for each batch."""
        tensors = self._tensors(f"inputs-{index:05}")
        return [tensors[str(i)] for i in range(len(tensors))]

    def finish_block(self, index: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any], next_inputs: list[Tensor]) -> None:
        """Write a finished block and what the next one reads; the block counts as finished when this returns."""
        if next_inputs:
            self._save(f"inputs-{index + 1:05}", {str(i): t for i, t in enumerate(next_inputs)})
        self._keep(f"block-{index:05}", tensors, data)
        (self.folder / f"inputs-{index:05}.safetensors").unlink(missing_ok=True)

    def delete(self) -> None:
        """Remove the run folder: its content lives in the checkpoint now."""
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()

    # files -------------------------------------------------------------------------------------------------------------------------------

    def _keep(self, name: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        self._save(name, tensors)
        _write_json(self.folder / f"{name}.json", data)

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        file = self.folder / f"{name}.safetensors"
        # safetensors refuses tensors that share memory
        save_file({k: t.detach().contiguous().clone() for k, t in tensors.items()}, file.with_suffix(".part"))
        _settle(file.with_suffix(".part"), file)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        file = self.folder / f"{name}.safetensors"
        try:
            return load_file(file)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file} cannot be read ({e}); delete {self.folder} and start again") from e


def _write_json(file: Path, data: Any) -> None:
    part = file.with_suffix(".json.part")
    part.write_text(json.dumps(data, indent=1, sort_keys=True))
    _settle(part, file)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as e:
        raise CheckpointError(f"{file} is not JSON ({e}); delete {file.parent} and start again") from e


def _settle(part: Path, file: Path) -> None:
    """Flush `part` to the disk and give it its name, in this order: after a crash the name stands for a whole file, or is not there."""
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, file)
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
