"""The address `timm:<name>@<weights>`: an image classifier of timm with weights from a file, or random ones; and folders that describe one.

| address | model |
|---|---|
| `timm:repvgg_a0@weights.safetensors` | timm's model with the tensors of a file (.safetensors, or .pth with tensors alone) |
| `timm:repvgg_a0@random`, `@random:7` | the same with random weights, by seed: to try things out, and for tests |
| `timm:repvgg_a0@random?num_classes=10&in_chans=1` | arguments of `timm.create_model` |
| a folder | `config.json` with "architecture" (below) and `model.safetensors`: what qcore writes, and zoo:tiny-repvgg |

Nothing is ever downloaded.  "architecture" is "timm.create_model" with "model" and "options", or "timm.models.byobnet.ByobNet" with "cfg", for
networks that have no name.  Blocks of branches are fused while the weights are read; weights that were fused before (with timm's `reparam_conv`) are
taken as they are.  A folder that says "deployed": true must hold fused weights.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.calibration.images import Preprocessing
from qcore.errors import CheckpointError, NotFound, SpecError
from qcore.evaluation.data import ImagePair
from qcore.model.reader import DictReader, SafetensorsReader, TensorReader
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from torch import nn

from qplug_reparam.branches import Branches
from qplug_reparam.fuse import FusedReader, fuse_structure

PREFIX = "timm:"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Description:
    """A network of timm, as data.

    architecture: "timm.create_model" (with `model` and `options`), or "timm.models.byobnet.ByobNet" (with `options` = its config.json entries)
    preprocessing: what it reads
    deployed:     whether its weights are said to be fused
    """

    architecture: str
    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    deployed: bool = False


class TimmSource(ModelSource):
    """timm's models from local weights, and folders that describe one."""

    name: ClassVar[str] = "timm"
    priority: ClassVar[int] = 10  # a folder is ours only if its config.json says so
    help: ClassVar[str] = "timm:repvgg_a0@weights.safetensors   a model of timm with weights from a file; @random: with random ones"

    def matches(self, uri: str) -> bool:
        return uri.startswith(PREFIX) or _describes_timm(Path(uri))

    def load(self, uri: str) -> LoadedModel:
        if not uri.startswith(PREFIX):
            folder = Path(uri)
            return _loaded(uri, read_description(folder), SafetensorsReader(folder / _WEIGHTS))
        name, weights, options = parse(uri)
        description = _described(Description("timm.create_model", name, options))
        notes: tuple[str, ...] = ()
        if weights.partition(":")[0] == "random":
            reader, notes = _random(description, weights, uri), ("weights are random: no figure here says anything about a trained model",)
        else:
            reader = read_weights(Path(weights))
        return _loaded(uri, description, reader, notes)

    def skeleton(self, folder: Path) -> nn.Module:
        return fuse_structure(build(read_description(folder)))[0]

    def data(self, folder: Path) -> ImagePair | None:
        preprocessing = read_description(folder).preprocessing
        return None if preprocessing is None else ImagePair(None, None, preprocessing)


def parse(uri: str) -> tuple[str, str, dict[str, Any]]:
    """(model, weights file or "random", options) of an address; SpecError where it says nothing of weights."""
    own, _, query = uri.removeprefix(PREFIX).partition("?")
    name, at, weights = own.partition("@")
    if not at or not weights:
        raise SpecError(
            f"{uri} does not say where the weights are, and qcore downloads none; name a file of them, timm:{name}@weights.safetensors, "
            f"or take random ones: timm:{name}@random"
        )
    options = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals:
            raise SpecError(f"{uri}: option {item!r} is not of the form name=value, such as num_classes=10")
        try:
            options[key] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            options[key] = value
    if "pretrained" in options:
        raise SpecError(f"{uri}: pretrained weights would be downloaded; name a local file behind the @")
    return name, weights, options


def build(description: Description) -> nn.Module:
    """The network with its branches, in eval mode, parameters on meta."""
    with parameters_on_meta():
        return _create(description).eval()


def _create(d: Description) -> nn.Module:
    try:
        import timm
    except ImportError as e:
        raise NotFound(f"{d.model or d.architecture} is a model of timm, which is not installed: pip install timm") from e
    if d.architecture == "timm.create_model":
        if not timm.is_model(d.model):
            near = ", ".join(timm.list_models(f"*{d.model.split('_')[0]}*")[:6])
            known = f"it has: {near}" if near else "`timm.list_models()` lists those it has"
            raise NotFound(f"timm {timm.__version__} has no model {d.model!r}; {known}")
        try:
            return timm.create_model(d.model, pretrained=False, **d.options)
        except TypeError as e:
            raise SpecError(f"timm cannot build {d.model} with {dict(d.options)}: {e}") from e
    if d.architecture == "timm.models.byobnet.ByobNet":
        from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

        cfg = dict(d.options["cfg"])
        blocks = tuple(ByoBlockCfg(**block) for block in cfg.pop("blocks"))
        return ByobNet(ByoModelCfg(blocks=blocks, **cfg), num_classes=d.options["num_classes"], in_chans=d.options["in_chans"])
    raise NotFound(f"architecture {d.architecture!r} is not one that is built here: timm.create_model, timm.models.byobnet.ByobNet")


def _described(d: Description) -> Description:
    """With timm's own preprocessing."""
    config = getattr(build(d), "pretrained_cfg", None) or {}
    size = tuple(config.get("input_size", (3, 224, 224)))
    size = (int(d.options.get("in_chans", size[0])), *size[1:])
    mean, std = (tuple(config.get(key, (0.5,) * 3)) for key in ("mean", "std"))
    if len(mean) != size[0]:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    preprocessing = Preprocessing(size, mean, std, crop=config.get("crop_pct", 0.875))
    return Description(d.architecture, d.model, d.options, preprocessing)


# weights ---------------------------------------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> TensorReader:
    """The tensors of a file; NotFound or CheckpointError where there are none."""
    if not path.is_file():
        raise NotFound(f"weights file {path} does not exist; qcore downloads none: pass a local .safetensors or .pth file, or @random")
    if path.suffix == ".safetensors":
        return SafetensorsReader(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise CheckpointError(f"{path} cannot be read as a file of tensors alone ({type(e).__name__}: {str(e).splitlines()[0]})") from e
    for key in ("state_dict", "model", "model_ema"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} holds no state dict; save model.state_dict() and pass that")
    return DictReader(tensors)


def _random(description: Description, weights: str, uri: str) -> TensorReader:
    _, _, seed = weights.partition(":")
    if seed and not seed.isdigit():
        raise SpecError(f"{uri}: the seed of random weights is a whole number, as in @random:7, got {seed!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed or 0))
        return DictReader({name: t.detach() for name, t in _create(description).eval().state_dict().items()})


def _loaded(uri: str, description: Description, reader: TensorReader, notes: tuple[str, ...] = ()) -> LoadedModel:
    branched = build(description)
    expected = set(branched.state_dict())
    model, fused = fuse_structure(branched)
    stored = set(reader.names())
    deployed = _deployed(uri, description, fused, stored)
    source = reader
    if fused and not deployed:
        if missing := sorted(expected - stored):
            raise CheckpointError(f"{uri}: the weights lack {len(missing)} tensors of the model, {missing[0]} first; are they of this architecture?")
        reader = FusedReader(reader, fused)
        blocks = sum(b.branched for b in fused)
        notes = (
            *notes,
            f"{blocks} blocks of branches are fused into one convolution each; the float model is the fused one",
            *_silent(fused, source),
        )
    dtypes = {reader[name].dtype for name in list(model.state_dict())[:1]}
    return LoadedModel(
        model=model,
        reader=FusedWeights(reader, set(model.state_dict()), () if deployed else fused, source, description),
        name=uri,
        dtype=next(iter(dtypes)),
        source=TimmSource.name,
        write_companions=lambda folder: write_description(folder, description),
        notes=notes,
        data=None if description.preprocessing is None else ImagePair(None, None, description.preprocessing),
    )


def _silent(fused: Iterable[Branches], reader: TensorReader) -> tuple[str, ...]:
    """A note where running variances are zero: what never varied in training has a gain of γ / √ε, often hundreds, as soon as it does."""
    norms = [path for b in fused for path in b.paths if f"{path}.running_var" in reader]
    found = {path: n for path in norms if (n := int((reader[f"{path}.running_var"] == 0).sum()))}
    if not found:
        return ()
    return (
        f"{sum(found.values())} channels of {len(found)} batch norms have a running variance of 0, {next(iter(found))} first: their gain is γ / √ε",
    )


def _deployed(uri: str, description: Description, fused: Iterable[Branches], stored: set[str]) -> bool:
    """Whether the weights are fused already; CheckpointError where some are and some are not, or where they are said to be and are not."""
    blocks = [b for b in fused if b.branched]
    have = [b for b in blocks if f"{b.name}.weight" in stored]
    lack = [b for b in blocks if b not in have]
    if lack and (have or description.deployed):
        said = "is called deployed" if description.deployed else f"has {have[0].name}"
        raise CheckpointError(
            f"{uri} {said}, yet the weights of {lack[0].module} ({len(lack)} of {len(blocks)} blocks) are those of separate branches; "
            'fuse all of them, or none: without "deployed" in config.json they are fused while they are read'
        )
    return bool(blocks) and not lack


class FusedWeights:
    """The weights of a network as it is deployed, and those that it was trained with.

    Counters of batches in a batch norm that is gone are left out.

    fused:  what was fused; () where the weights came that way
    source: the weights with branches
    """

    def __init__(self, reader: TensorReader, names: set[str], fused: Sequence[Branches], source: TensorReader, description: Description) -> None:
        self._reader, self._names, self._description = reader, names, description
        self.fused, self.source = tuple(fused), source

    def branched(self) -> nn.Module:
        """The network as it was trained, in memory and in eval mode."""
        model = build(self._description)
        model.load_state_dict({name: self.source[name] for name in model.state_dict()}, assign=True)
        return model.eval()

    def probe(self, loaded: LoadedModel, count: int) -> torch.Tensor:
        """Images to compare outputs on: of the calibration data, or noise of the right shape where there is none.  [count, C, H, W]"""
        data, preprocessing = loaded.data, self._description.preprocessing
        if data is not None and data.calibration is not None:
            return data.calibration.preprocessing(data.calibration.read()[0][:count])
        size = (3, 224, 224) if preprocessing is None else preprocessing.size
        return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))

    def names(self) -> Iterable[str]:
        # what is no counter and not of the model stays, so that the plan can say so
        return [n for n in self._reader.names() if n in self._names or not n.endswith("num_batches_tracked")]

    def __contains__(self, name: object) -> bool:
        return name in self._reader

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._reader[name]


# descriptions ----------------------------------------------------------------------------------------------------------------------------


def _describes_timm(folder: Path) -> bool:
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
        return str(json.loads(text).get("architecture", "")).startswith("timm.")
    except (OSError, ValueError, AttributeError):
        return False


def read_description(folder: Path) -> Description:
    """The `config.json` of a folder; CheckpointError where it lacks something."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}); it describes the network") from e
    architecture = config.get("architecture", "")
    try:
        if architecture == "timm.create_model":
            model, options = config["model"], config["options"]
        else:
            model, options = "", {key: config[key] for key in ("cfg", "num_classes", "in_chans")}
        preprocessing = None
        if "preprocessing" in config:
            p = config["preprocessing"]
            size = tuple(config["input_size"])
            preprocessing = Preprocessing(size, tuple(p["mean"]), tuple(p["std"]), p.get("pad", 0), p.get("crop", 0.875))
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"{path} lacks {e} for the architecture {architecture!r}") from e
    return Description(architecture, model, options, preprocessing, bool(config.get("deployed", False)))


def write_description(folder: Path, d: Description) -> None:
    """`read_description` reads it back."""
    own = {"model": d.model, "options": dict(d.options)} if d.architecture == "timm.create_model" else dict(d.options)
    config: dict[str, Any] = {"architecture": d.architecture, **own}
    if d.preprocessing is not None:
        p = d.preprocessing
        config |= {"input_size": list(p.size), "preprocessing": {"mean": list(p.mean), "std": list(p.std), "pad": p.pad, "crop": p.crop}}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
