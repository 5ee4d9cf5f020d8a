"""What a run has finished, on disk, so that a killed run goes on where it was.

    run folder/
      lock                      held while a process writes here: a second one is refused
      run.json                  what the run is made of: weights, data, recipe, versions; a run with another content is refused
      rewrite.safetensors .json what the model-wide transforms found; other steps that are found once lie beside it in the same way
      block-00003.safetensors   the finished block: packed parts, remaining parameters
      block-00003.json          its modules' types and configs, and its records
      inputs-00004-00007.safetensors   what the next block reads, of each batch (that of earlier blocks is deleted)

A block is finished when its json lies there: it is written last, and every file is written beside, flushed, and renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from qcore.errors import CheckpointError, NotFound
from qcore.model.safetensors_file import SafetensorsFile, write_safetensors


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
    """The run folder of one quantization, locked until `close`.

    content: JSON-ready description of all that decides the result; CheckpointError when the folder holds a run with another one, or another process
    fresh:   forget whatever the folder holds
    guest:   a process beside the one that writes: it reads, and keeps the inputs of its own batches, but no steps and blocks
    """

    def __init__(self, folder: Path, content: Mapping[str, Any], *, fresh: bool = False, guest: bool = False) -> None:
        self.folder, self.guest = folder, guest
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = None if guest else _locked(folder)
        if fresh:
            for path in folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        there = _read_json(folder / "run.json") if (folder / "run.json").exists() else None
        wanted = json.loads(json.dumps(content, sort_keys=True))
        if there is None:
            _write_json(folder / "run.json", wanted)
        elif there != wanted:
            self.close()
            differing = [k for k in sorted(set(there) | set(wanted)) if there.get(k) != wanted.get(k)]
            lines = "\n".join(f"  {k}: the run has {a!r}, now {b!r}" for k in differing for a, b in (_unlike(there.get(k), wanted.get(k)),))
            raise CheckpointError(f"{folder} holds a run made of something else; resume with the same, or delete the folder\n{lines}")

    def close(self) -> None:
        """Give the folder free for another process."""
        if self._lock is not None:
            self._lock.release()

    # steps that are found once ------------------------------------------------------------------------------------------------------------

    def step(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `keep_step` kept under this name, as (tensors, data); None when that step was not finished."""
        if not (self.folder / f"{name}.json").exists():
            return None
        file = _opened(self.folder / f"{name}.safetensors")
        return {n: file[n] for n in file.names()}, _read_json(self.folder / f"{name}.json")

    def keep_step(self, name: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Keep what one step found: a rewrite, an allocation, what was learned so far."""
        if self.guest:
            return
        self._save(name, tensors)
        _write_json(self.folder / f"{name}.json", data)

    # blocks -------------------------------------------------------------------------------------------------------------------------------

    def finished(self, blocks: int) -> int:
        """How many blocks, counted from the first, are finished."""
        done = 0
        while done < blocks and (self.folder / f"block-{done:05}.json").exists():
            done += 1
        return done

    def block(self, index: int) -> tuple[SafetensorsFile, dict[str, Any]]:
        """A finished block: its tensors, read when asked for, and its data."""
        name = f"block-{index:05}"
        return _opened(self.folder / f"{name}.safetensors"), _read_json(self.folder / f"{name}.json")

    def finish_block(self, index: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Keep a finished block, after the inputs of the next one; it counts as finished when this returns, and its own inputs are deleted."""
        self.keep_step(f"block-{index:05}", tensors, data)
        if self.guest:
            return
        for file in self.folder.glob(f"inputs-{index:05}-*.safetensors"):
            file.unlink()

    def keep_input(self, index: int, batch: int, hidden: Tensor) -> None:
        """Keep what block `index` reads of one batch."""
        self._save(f"inputs-{index:05}-{batch:05}", {"hidden": hidden})

    def inputs(self, index: int, batches: Sequence[int]) -> "Inputs":
        """What block `index` reads, of these batches, read when asked for; CheckpointError where a batch is missing."""
        missing = [b for b in batches if not (self.folder / f"inputs-{index:05}-{b:05}.safetensors").is_file()]
        if missing:
            raise CheckpointError(f"{self.folder} lacks the inputs of block {index} for batch {missing[0]}; delete the folder and start again")
        return Inputs(self.folder, index, batches)

    # files --------------------------------------------------------------------------------------------------------------------------------

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        file = self.folder / f"{name}.safetensors"
        write_safetensors(file.with_suffix(".part"), tensors)
        _settle(file.with_suffix(".part"), file)

    def delete(self) -> None:
        """Remove the run folder: its content lives in the checkpoint now."""
        self.close()
        shutil.rmtree(self.folder)


class Inputs(Sequence[Tensor]):
    """The hidden states that one block reads, one tensor a batch, on disk."""

    def __init__(self, folder: Path, index: int, batches: Sequence[int]) -> None:
        self._folder, self._index, self._batches = folder, index, batches

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, batch: int) -> Tensor: ...
    @overload
    def __getitem__(self, batch: slice) -> list[Tensor]: ...
    def __getitem__(self, batch: int | slice) -> Tensor | list[Tensor]:
        if isinstance(batch, slice):
            return [self[b] for b in range(*batch.indices(len(self)))]
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        return _opened(self._folder / f"inputs-{self._index:05}-{self._batches[batch]:05}.safetensors")["hidden"]


class FinishedBlocks:
    """A reader over the tensors of all finished blocks of a journal, under their names in the whole model."""

    def __init__(self, journal: Journal, blocks: int) -> None:
        files = [journal.block(index)[0] for index in range(journal.finished(blocks))]
        self._where = {name: file for file in files for name in file.names()}

    def names(self) -> Iterable[str]:
        return self._where.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._where:
            raise NotFound(f"no finished block holds {name!r}")
        return self._where[name][name]


def _locked(folder: Path) -> FileLock:
    """A lock on the folder, which the system takes away when the process ends, however it ends."""
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(f"another process is writing into {folder}; wait for it to end, or choose another folder") from None
    return lock


def _write_json(file: Path, data: Any) -> None:
    part = file.with_suffix(".json.part")
    part.write_text(json.dumps(data, indent=1, sort_keys=True), encoding="utf-8")
    _settle(part, file)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{file} is not JSON ({e}); delete {file.parent} and start again") from e


def _opened(file: Path) -> SafetensorsFile:
    try:
        return SafetensorsFile(file)
    except CheckpointError as e:
        raise CheckpointError(f"{file} of an interrupted run is missing or damaged; delete {file.parent} and start again") from e


def _unlike(a: Any, b: Any) -> tuple[Any, Any]:
    """Of two texts of several lines, such as recipes, the lines that only one of them has; other values as they are."""
    if not (isinstance(a, str) and isinstance(b, str) and "\n" in a + b):
        return a, b
    lines, others = a.splitlines(), b.splitlines()
    return "\n".join(x for x in lines if x not in others), "\n".join(x for x in others if x not in lines)


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
