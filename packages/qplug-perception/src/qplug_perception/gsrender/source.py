"""Where an occupancy network comes from: `gsrender:tiny`, which is trained, `gsrender:random`, or a folder that this source wrote."""

import json
from pathlib import Path
from typing import ClassVar

import torch
from qcore.errors import CheckpointError, NotFound
from qcore.model.reader import DictReader, SafetensorsReader, TensorReader
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from torch import nn

from qplug_perception.gsrender.data import SceneData
from qplug_perception.gsrender.model import OccupancyConfig, OccupancyNet

ARCHITECTURE = "gsrender"
WEIGHTS = Path(__file__).parent / "weights"
_NOTE = "trained and evaluated on made-up streets of boxes, not on nuScenes"


class GSRenderSource(ModelSource):
    """Small occupancy networks with a Gaussian head."""

    name: ClassVar[str] = "gsrender"
    help: ClassVar[str] = "gsrender:tiny        a small occupancy network with a Gaussian head; gsrender:random[:seed]; a folder of one"
    priority: ClassVar[int] = 3

    def matches(self, uri: str) -> bool:
        return uri.startswith("gsrender:") or (Path(uri).is_dir() and _architecture(Path(uri)) == ARCHITECTURE)

    def load(self, uri: str) -> LoadedModel:
        name = uri.removeprefix("gsrender:") if uri.startswith("gsrender:") else ""
        kind, _, seed = name.partition(":")
        if kind == "random":
            if seed and not seed.isdigit():
                raise NotFound(f"{uri}: a seed is a whole number, as in gsrender:random:7, got {seed!r}")
            config = OccupancyConfig()
            return _loaded(uri, config, _random(config, int(seed or 0)), ("its weights are random",))
        folder = WEIGHTS / kind if kind else Path(uri)
        if seed or not (folder / "model.safetensors").is_file():
            have = sorted(p.parent.name for p in WEIGHTS.glob("*/model.safetensors"))
            raise NotFound(f"no occupancy network {uri!r}; have: {', '.join(f'gsrender:{n}' for n in (*have, 'random'))}, or a folder with one")
        return _loaded(uri, read_config(folder), SafetensorsReader(folder / "model.safetensors"), (_NOTE,) if kind else ())

    def skeleton(self, folder: Path) -> nn.Module:
        return _skeleton(read_config(folder))

    def data(self, folder: Path) -> SceneData:
        return SceneData.made(read_config(folder))


def _architecture(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architecture", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def read_config(folder: Path) -> OccupancyConfig:
    """The network that a folder's config.json describes; CheckpointError where it describes none."""
    path = folder / "config.json"
    try:
        return OccupancyConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} does not describe an occupancy network ({type(e).__name__}: {e})") from e


def _skeleton(config: OccupancyConfig) -> OccupancyNet:
    with parameters_on_meta():
        return OccupancyNet(config).eval()


def _random(config: OccupancyConfig, seed: int) -> TensorReader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OccupancyNet(config)
        # the statistics of trained batch norms are not 0 and 1 either
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d):
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.1, 0.5)
        return DictReader({name: t.detach() for name, t in model.state_dict().items()})


def _loaded(uri: str, config: OccupancyConfig, reader: TensorReader, notes: tuple[str, ...]) -> LoadedModel:
    def write(target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"architecture": ARCHITECTURE, "config": config.to_dict()}, indent=1)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")

    return LoadedModel(
        model=_skeleton(config),
        reader=reader,
        name=uri,
        source=GSRenderSource.name,
        write_companions=write,
        notes=notes,
        data=SceneData.made(config),
    )
