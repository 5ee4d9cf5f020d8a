"""Addresses of PETRs.

| address | model |
|---|---|
| `petr:tiny-petr`, `petr:tiny-qfpe` | the small detectors of this package, trained on made scenes (`tools/zoo/train_tiny_petr.py`) |
| a folder | `config.json` with "model_type": "petr" and a table "petr" (`PETRConfig`), and `model.safetensors`: what qcore writes |
| `petr:<config.json>@<weights>` | that config, and weights from a file, .safetensors or .pth of tensors alone; the release's too: released.py |
| `petr:<config.json>@random`, `@random:7` | random weights by seed, to try things out |

Nothing is ever downloaded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.errors import CheckpointError, NotFound, SpecError
from qcore.model import DictReader, LoadedModel, ModelSource, parameters_on_meta
from qcore.model.reader import SafetensorsReader, TensorReader
from torch import nn

from qplug_perception.petr.config import PETRConfig
from qplug_perception.petr.data import ScenePair
from qplug_perception.petr.model import PETR
from qplug_perception.petr.released import read_weights

PREFIX = "petr:"
KIND = "petr"
ZOO = Path(__file__).parent / "zoo"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class PETRSource(ModelSource):
    """PETRs of this package, of folders, and of a config with weights from a file."""

    name: ClassVar[str] = "petr"
    priority: ClassVar[int] = 10  # a folder is ours only if its config.json says so
    help: ClassVar[str] = "petr:tiny-petr, petr:tiny-qfpe   small 3-D detectors;  petr:config.json@weights.pth: a PETR with weights from a file"

    def matches(self, uri: str) -> bool:
        return uri.startswith(PREFIX) or _is_petr(Path(uri))

    def load(self, uri: str) -> LoadedModel:
        if not uri.startswith(PREFIX):
            return _folder(Path(uri), uri)
        own = uri.removeprefix(PREFIX)
        config_file, at, weights = own.partition("@")
        if at:
            return _described(uri, read_config(Path(config_file)), weights)
        if (ZOO / own / _CONFIG).is_file() and own:
            return _folder(ZOO / own, uri)
        there = ", ".join(f"{PREFIX}{p.name}" for p in sorted(ZOO.glob("tiny-*"))) or "none"
        raise NotFound(f"{uri} names no model of this package (there are: {there}); for your own write petr:config.json@weights.safetensors")

    def skeleton(self, folder: Path) -> nn.Module:
        return build(read_config(folder / _CONFIG))

    def data(self, folder: Path) -> ScenePair:
        return _data(read_config(folder / _CONFIG))


def build(config: PETRConfig) -> PETR:
    """The network in eval mode, parameters on meta."""
    with parameters_on_meta():
        return PETR(config).eval()


def read_config(file: Path) -> PETRConfig:
    """NotFound, or SpecError with the file's name."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise NotFound(f'{file} cannot be read ({e.strerror}); it holds the fields of PETRConfig and "model_type": "petr"') from e
    except ValueError as e:
        raise SpecError(f"{file} is no JSON ({e}); it holds the fields of PETRConfig") from e
    if not isinstance(data, dict) or data.get("model_type") != KIND:
        raise SpecError(f'{file} does not say "model_type": "{KIND}"; it is of another model')
    try:
        return PETRConfig.from_dict(_entry(data))
    except SpecError as e:
        raise SpecError(f"{file}: {e}") from e


def _entry(data: Any) -> Mapping[str, Any]:
    if not isinstance(data.get(KIND), dict):
        raise SpecError(f'it has no table "{KIND}" with the fields of PETRConfig; {{}} means the defaults')
    return data[KIND]


def _is_petr(folder: Path) -> bool:
    try:
        return json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("model_type") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def _data(config: PETRConfig) -> ScenePair:
    """Made scenes for the detectors that were trained on them; others are given files."""
    trained_on_them = any(read_config(p / _CONFIG) == config for p in ZOO.glob("tiny-*"))
    return ScenePair.made(config) if trained_on_them else ScenePair(None, None, config)


def _folder(folder: Path, uri: str) -> LoadedModel:
    config = read_config(folder / _CONFIG)
    if not (folder / _WEIGHTS).is_file():
        raise NotFound(f"{folder} has a {_CONFIG} and no {_WEIGHTS}")
    return _loaded(uri, config, SafetensorsReader(folder / _WEIGHTS))


def _described(uri: str, config: PETRConfig, weights: str) -> LoadedModel:
    kind, _, seed = weights.partition(":")
    if kind == "random":
        if seed and not seed.isdigit():
            raise SpecError(f"{uri}: the seed of random weights is a whole number, as in @random:7, got {seed!r}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed or 0))
            reader: TensorReader = DictReader({n: t.detach() for n, t in PETR(config).eval().state_dict().items()})
        return _loaded(uri, config, reader, ("weights are random: no figure here says anything about a trained model",))
    return _loaded(uri, config, read_weights(Path(weights)))


def _loaded(uri: str, config: PETRConfig, reader: TensorReader, notes: tuple[str, ...] = ()) -> LoadedModel:
    model = build(config)
    there = set(reader.names())
    if missing := sorted(n for n in model.state_dict() if n not in there):
        raise CheckpointError(f"{uri}: the weights lack {len(missing)} tensors of the model, {missing[0]} first; are they of this config?")
    shapes = ((n, tuple(reader[n].shape), tuple(t.shape)) for n, t in model.state_dict().items())
    for n, found, wanted in shapes:
        if found != wanted:
            raise CheckpointError(f"{uri}: {n} is {found} in the weights, the config makes it {wanted}; are they of this config?")

    def write(target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        (target / _CONFIG).write_text(json.dumps({"model_type": KIND, KIND: config.to_dict()}, indent=1) + "\n", encoding="utf-8")

    floats: Any = reader["norm.weight"].dtype
    return LoadedModel(model, reader, uri, floats, source=PETRSource.name, write_companions=write, notes=notes, data=_data(config))
