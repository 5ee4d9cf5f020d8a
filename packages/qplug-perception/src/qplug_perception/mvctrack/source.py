"""Where a tracker comes from: `mvctrack:tiny`, which is trained, `mvctrack:random`, or a folder that this source wrote."""

import json
from pathlib import Path
from typing import ClassVar

import torch
from qcore.errors import CheckpointError, NotFound
from qcore.model.reader import DictReader, SafetensorsReader, TensorReader
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from torch import nn

from qplug_perception.mvctrack.data import TrackingData
from qplug_perception.mvctrack.tracker import MVCTracker, TrackerConfig

ARCHITECTURE = "mvctrack"
WEIGHTS = Path(__file__).parent / "weights"
_NOTE = "trained and evaluated on made-up sequences of a cuboid, not on nuScenes"


class MVCTrackSource(ModelSource):
    """Small voxel trackers."""

    name: ClassVar[str] = "mvctrack"
    help: ClassVar[str] = "mvctrack:random[:seed]  a small voxel tracker of one object; mvctrack:tiny where it ships; a folder of one"
    priority: ClassVar[int] = 3

    def matches(self, uri: str) -> bool:
        return uri.startswith("mvctrack:") or (Path(uri).is_dir() and _architecture(Path(uri)) == ARCHITECTURE)

    def load(self, uri: str) -> LoadedModel:
        name = uri.removeprefix("mvctrack:") if uri.startswith("mvctrack:") else ""
        kind, _, seed = name.partition(":")
        if kind == "random":
            if seed and not seed.isdigit():
                raise NotFound(f"{uri}: a seed is a whole number, as in mvctrack:random:7, got {seed!r}")
            config = TrackerConfig()
            return _loaded(uri, config, _random(config, int(seed or 0)), ("its weights are random",))
        folder = WEIGHTS / kind if kind else Path(uri)
        if seed or not (folder / "model.safetensors").is_file():
            have = sorted(p.parent.name for p in WEIGHTS.glob("*/model.safetensors"))
            raise NotFound(f"no tracker {uri!r}; have: {', '.join(f'mvctrack:{n}' for n in (*have, 'random'))}, or a folder with one")
        return _loaded(uri, read_config(folder), SafetensorsReader(folder / "model.safetensors"), (_NOTE,) if kind else ())

    def skeleton(self, folder: Path) -> nn.Module:
        return _skeleton(read_config(folder))

    def data(self, folder: Path) -> TrackingData:
        return TrackingData.made(read_config(folder))


def _architecture(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architecture", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def read_config(folder: Path) -> TrackerConfig:
    """The tracker that a folder's config.json describes; CheckpointError where it describes none."""
    path = folder / "config.json"
    try:
        return TrackerConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} does not describe a tracker ({type(e).__name__}: {e})") from e


def _skeleton(config: TrackerConfig) -> MVCTracker:
    with parameters_on_meta():
        return MVCTracker(config).eval()


def _random(config: TrackerConfig, seed: int) -> TensorReader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DictReader({name: t.detach() for name, t in MVCTracker(config).state_dict().items()})


def _loaded(uri: str, config: TrackerConfig, reader: TensorReader, notes: tuple[str, ...]) -> LoadedModel:
    def write(target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"architecture": ARCHITECTURE, "config": config.to_dict()}, indent=1)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")

    return LoadedModel(
        model=_skeleton(config),
        reader=reader,
        name=uri,
        source=MVCTrackSource.name,
        write_companions=write,
        notes=notes,
        data=TrackingData.made(config),
    )
