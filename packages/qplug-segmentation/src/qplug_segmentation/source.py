"""The address `lavt:<folder>`: LAVT with local weights, and the folders that qcore writes.

A folder holds `config.json` ("architecture": "lavt_one", sizes under "lavt"), the weights and BERT's `vocab.txt`:

| weights | |
|---|---|
| `model.safetensors` | under the released names: backbone.…, classifier.…, text_encoder.… |
| `model.pth` | a released checkpoint; its "model" entry is read, as tensors alone, never as pickled objects |

Nothing is ever downloaded.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.errors import CheckpointError, NotFound
from qcore.model.reader import DictReader, SafetensorsReader, TensorReader
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from torch import Tensor, nn

PREFIX = "lavt:"
ARCHITECTURE = "lavt_one"
_CONFIG, _VOCABULARY = "config.json", "vocab.txt"
# buffers that newer libraries compute, the pooler that LAVT drops, and counters that do nothing in eval mode
_LEFT_OUT = ("relative_position_index", "attn_mask", "embeddings.position_ids", "embeddings.token_type_ids")


@dataclass(frozen=True)
class Folder:
    """A folder's config.json, read."""

    path: Path
    config: dict[str, Any]

    @property
    def side(self) -> int:
        return int(self.config.get("image", {}).get("side", 480))

    @property
    def tokens(self) -> int:
        return int(self.config.get("tokens", 20))


class LavtSource(ModelSource):
    """LAVT checkpoints in folders."""

    name: ClassVar[str] = "lavt"
    priority: ClassVar[int] = 10  # a folder is ours only if its config.json says so
    help: ClassVar[str] = "lavt:path/to/folder   LAVT (lavt_one) with config.json, model.safetensors or model.pth, and vocab.txt"

    def matches(self, uri: str) -> bool:
        return uri.startswith(PREFIX) or _is_lavt(Path(uri))

    def load(self, uri: str) -> LoadedModel:
        folder = read_folder(Path(uri.removeprefix(PREFIX)))
        model = build(folder)
        reader = read_weights(folder.path, set(model.state_dict()))
        return LoadedModel(
            model=model,
            reader=reader,
            name=uri,
            dtype=torch.float32,
            source=self.name,
            write_companions=lambda target: _write_companions(folder, target),
            data=_data(folder),
        )

    def skeleton(self, folder: Path) -> nn.Module:
        return build(read_folder(folder))

    def data(self, folder: Path) -> Any:
        return _data(read_folder(folder))


def build(folder: Folder) -> Any:
    """The model, parameters on meta, in eval mode."""
    from qplug_segmentation.lavt import Lavt, LavtConfig

    with parameters_on_meta():
        return Lavt(LavtConfig.from_dict(folder.config.get("lavt", {}))).eval()


def read_folder(path: Path) -> Folder:
    """NotFound or CheckpointError where the folder describes no LAVT."""
    if not path.is_dir():
        raise NotFound(f"folder {path} does not exist; lavt: wants a folder with {_CONFIG}, the weights and {_VOCABULARY}")
    file = path / _CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file} cannot be read ({e}); for a released Swin-B checkpoint write " + '{"architecture": "lavt_one"}') from e
    if not isinstance(config, dict) or config.get("architecture") != ARCHITECTURE:
        found = config.get("architecture") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{file} is about architecture {found!r}; only {ARCHITECTURE!r} is built here")
    return Folder(path, config)


def read_weights(folder: Path, expected: set[str]) -> TensorReader:
    """The tensors of a folder under the model's names; CheckpointError names what is missing or of another architecture."""
    safe, pickled = folder / "model.safetensors", folder / "model.pth"
    if safe.is_file():
        stored: TensorReader = SafetensorsReader(safe)
    elif pickled.is_file():
        stored = DictReader(_released(pickled))
    else:
        raise NotFound(f"{folder} holds neither {safe.name} nor {pickled.name}; qcore downloads nothing: put the checkpoint there")
    names = {n for n in stored.names() if not n.endswith(_LEFT_OUT) and not n.startswith("text_encoder.pooler")}
    if missing := sorted(expected - names):
        raise CheckpointError(
            f"{folder}: the weights lack {len(missing)} of {len(expected)} tensors, {missing[0]} first; are they of lavt_one (not 'lavt', which "
            f"keeps BERT in a checkpoint of its own), and do the sizes in {_CONFIG} fit?"
        )
    if extra := sorted(names - expected):
        raise CheckpointError(
            f"{folder}: {len(extra)} tensors have no place in the model, {extra[0]} first; do the sizes in {_CONFIG} fit the weights?"
        )
    return Float32Reader(stored, expected)


def _released(path: Path) -> dict[str, Tensor]:
    """The "model" entry of a released checkpoint.  Its other entries are numbers and an argparse.Namespace, which is data alone."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise CheckpointError(
            f"{path} cannot be read as a file of tensors alone ({type(e).__name__}: {str(e).splitlines()[0]}); where you trust it, convert it once: "
            "torch.load(path, weights_only=False)['model'], then safetensors.torch.save_file(…, 'model.safetensors')"
        ) from e
    tensors = found.get("model", found) if isinstance(found, dict) else None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} holds no state dict, neither itself nor under 'model'")
    return {name.removeprefix("module."): t for name, t in tensors.items()}


class Float32Reader:
    """Tensors of another reader, float16 ones widened: what runs and is compared is float32, with the numbers that were stored."""

    def __init__(self, reader: TensorReader, names: set[str]) -> None:
        self._reader, self._names = reader, names

    def names(self) -> Iterable[str]:
        return [n for n in self._reader.names() if n in self._names]

    def __contains__(self, name: object) -> bool:
        return name in self._names and name in self._reader

    def __getitem__(self, name: str) -> Tensor:
        value = self._reader[name]
        return value.float() if value.is_floating_point() else value


def _data(folder: Folder) -> Any:
    """What the model reads: generated shapes where config.json says so, else what the user passes.  None without a vocabulary"""
    from qplug_segmentation.refer import open_folder
    from qplug_segmentation.shapes import Shapes
    from qplug_segmentation.triples import ReferringData, SentenceEncoder

    vocabulary = folder.path / _VOCABULARY
    if not vocabulary.is_file():
        return None
    encode = SentenceEncoder(vocabulary, folder.tokens)
    side, own = folder.side, folder.config.get("shapes")

    def opened(path: Path, split: str) -> Any:
        return open_folder(path, split, side)

    if own is None:
        return ReferringData(encode, opened)
    calibration = Shapes("train", int(own["calibration"]), int(own["seed"]), side=side)
    return ReferringData(encode, opened, calibration, Shapes("val", int(own["evaluation"]), int(own["seed"]), side=side))


def _write_companions(folder: Folder, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    (target / _CONFIG).write_text(json.dumps(folder.config, indent=1) + "\n", encoding="utf-8")
    if (folder.path / _VOCABULARY).is_file():
        shutil.copyfile(folder.path / _VOCABULARY, target / _VOCABULARY)


def _is_lavt(path: Path) -> bool:
    try:
        return json.loads((path / _CONFIG).read_text(encoding="utf-8")).get("architecture") == ARCHITECTURE
    except (OSError, ValueError, AttributeError):
        return False
