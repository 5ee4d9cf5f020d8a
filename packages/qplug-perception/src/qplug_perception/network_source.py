"""Where the small networks of this package come from: a trained one that it brings, random weights by seed, or a folder that qcore wrote.

A folder holds `config.json` ({"architecture": the source's name, "config": …}) and `model.safetensors`.
"""

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.errors import CheckpointError, NotFound
from qcore.model.reader import DictReader, SafetensorsReader, TensorReader
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from torch import nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class NetworkSource(ModelSource):
    """Addresses `<name>:<shipped>`, `<name>:random[:seed]`, and folders.

    what:    the network, as messages name it: "an occupancy network"
    shipped: the folder in which each trained network has a folder of its own
    note:    what users are told of a shipped one
    config:  the class of its settings, with `from_dict` and `to_dict`
    """

    priority: ClassVar[int] = 3
    what: ClassVar[str]
    shipped: ClassVar[Path]
    note: ClassVar[str]
    config: ClassVar[Any]

    @abstractmethod
    def build(self, config: Any) -> nn.Module:
        """The network of these settings."""

    def random(self, config: Any) -> nn.Module:
        """The network with weights drawn from the global generator, which has a seed when this is called."""
        return self.build(config)

    @abstractmethod
    def made(self, config: Any) -> Any:
        """The `ModelData` that is made for these settings."""

    def matches(self, uri: str) -> bool:
        return uri.startswith(f"{self.name}:") or (Path(uri).is_dir() and _architecture(Path(uri)) == self.name)

    def load(self, uri: str) -> LoadedModel:
        name = uri.removeprefix(f"{self.name}:") if uri.startswith(f"{self.name}:") else ""
        kind, _, seed = name.partition(":")
        if kind == "random":
            if seed and not seed.isdigit():
                raise NotFound(f"{uri}: a seed is a whole number, as in {self.name}:random:7, got {seed!r}")
            config = self.config()
            return self._loaded(uri, config, self._random(config, int(seed or 0)), ("its weights are random",))
        folder = self.shipped / kind if kind else Path(uri)
        if seed or not (folder / WEIGHTS).is_file():
            have = (*sorted(p.parent.name for p in self.shipped.glob(f"*/{WEIGHTS}")), "random")
            raise NotFound(f"{uri!r} is no address of {self.what}; have: {', '.join(f'{self.name}:{n}' for n in have)}, or a folder with one")
        return self._loaded(uri, self.read_config(folder), SafetensorsReader(folder / WEIGHTS), (self.note,) if kind else ())

    def skeleton(self, folder: Path) -> nn.Module:
        return self._on_meta(self.read_config(folder))

    def data(self, folder: Path) -> Any:
        return self.made(self.read_config(folder))

    def read_config(self, folder: Path) -> Any:
        """The settings in a folder's config.json; CheckpointError where there are none."""
        path = folder / CONFIG
        try:
            return self.config.from_dict(json.loads(path.read_text(encoding="utf-8"))["config"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{path} does not describe {self.what} ({type(e).__name__}: {e})") from e

    def _on_meta(self, config: Any) -> nn.Module:
        with parameters_on_meta():
            return self.build(config).eval()

    def _random(self, config: Any, seed: int) -> TensorReader:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return DictReader({name: t.detach() for name, t in self.random(config).state_dict().items()})

    def _loaded(self, uri: str, config: Any, reader: TensorReader, notes: tuple[str, ...]) -> LoadedModel:
        def write(target: Path) -> None:
            target.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"architecture": self.name, "config": config.to_dict()}, indent=1)
            (target / CONFIG).write_text(text + "\n", encoding="utf-8")

        return LoadedModel(
            model=self._on_meta(config),
            reader=reader,
            name=uri,
            source=self.name,
            write_companions=write,
            notes=notes,
            data=self.made(config),
        )


def _architecture(folder: Path) -> str:
    try:
        return str(json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("architecture", ""))
    except (OSError, ValueError, AttributeError):
        return ""
