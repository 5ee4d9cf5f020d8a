"""Models of open_clip, taken over into transformers' CLIP: the same numbers in layers that can be reached.

| address | weights |
|---|---|
| `open_clip:ViT-B-32@weights.safetensors` | of that file; also one that `torch.save` wrote, which is read without running code |
| `open_clip:ViT-B-32@random`, `@random:7` | random ones, by seed: to try things out |
| `open_clip:path/to/folder` | open_clip_config.json and open_clip_model.safetensors, as open_clip saves them |

open_clip's attention is torch.nn.MultiheadAttention, whose projections are one parameter that no hook sees.  transformers' CLIP is the same
function with layers of its own, so a model of open_clip becomes one, tensor by tensor; a test compares the outputs of both in float64.  What
transformers' CLIP has no word for (other towers, other ways to pool, sigmoid losses) is refused, all at once.
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar
from zipfile import is_zipfile

import torch
from qcore.errors import CheckpointError, NotFound, SpecError
from qcore.model.reader import DictReader, SafetensorsReader, TensorReader
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from qcore.model.transformers_folder import RenamedReader
from torch import Tensor, nn

PREFIX = "open_clip:"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# what transformers' CLIP can say; patches are dropped in training alone
_KNOWN = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}


class OpenClip(ModelSource):
    """A CLIP of open_clip with two towers of its own kind."""

    name: ClassVar[str] = "open-clip"
    help: ClassVar[str] = "open_clip:ViT-B-32@weights.safetensors   a CLIP of open_clip, by its name or a folder; @random: with random weights"

    def matches(self, uri: str) -> bool:
        return uri.startswith(PREFIX)

    def load(self, uri: str) -> LoadedModel:
        name, at, weights = uri.removeprefix(PREFIX).partition("@")
        folder = Path(name)
        settings = _settings(folder / CONFIG) if (folder / CONFIG).is_file() else {"model_cfg": named(name), "preprocess_cfg": {}}
        if not at and not (folder / CONFIG).is_file():
            raise NotFound(f"{uri} names no weights, and qcore downloads none; pass {uri}@weights.safetensors, or try random ones: {uri}@random")
        config = clip_config(settings["model_cfg"], uri)
        model = _on_meta(config)
        stored = _weights(uri, settings["model_cfg"], Path(weights) if at else folder / WEIGHTS)
        reader = AsTransformers(stored, model, uri)
        dtype = stored.dtype() if isinstance(stored, SafetensorsReader) else stored["visual.conv1.weight"].dtype

        def write(target: Path) -> None:
            config.save_pretrained(target)
            (target / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

        return LoadedModel(model, reader, name=uri, dtype=dtype, source=self.name, write_companions=write, data=self._data(settings))

    def skeleton(self, folder: Path) -> nn.Module:
        return _on_meta(clip_config(_settings(folder / CONFIG)["model_cfg"], str(folder)))

    def data(self, folder: Path) -> Any:
        return self._data(_settings(folder / CONFIG))

    @staticmethod
    def _data(settings: Mapping[str, Any]) -> Any:
        from qplug_multimodal.retrieval import data_of

        return data_of(settings)


def named(name: str) -> dict[str, Any]:
    """open_clip's configuration of a model.  NotFound where it has none of that name, or is not installed."""
    open_clip = _open_clip()
    found = open_clip.get_model_config(name)
    if found is None:
        near = ", ".join(get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4) or ("ViT-B-32", "ViT-L-14", "…"))
        raise NotFound(f"open_clip has no model {name!r}, and there is no folder of that name with {CONFIG}; it has {near}")
    return dict(found)


def clip_config(cfg: Mapping[str, Any], where: str) -> Any:
    """The same in transformers' words.  SpecError with all that has none."""
    strange = [
        f"{part or 'model'}.{key} = {value!r}" for part, known in _KNOWN.items() for key, value in _part(cfg, part).items() if key not in known
    ]
    if isinstance(layers := _part(cfg, "vision_cfg").get("layers"), list):
        strange.append(f"vision_cfg.layers = {layers}, a ResNet")
    if strange:
        raise SpecError(f"{where} is not taken over; transformers' CLIP has nothing for " + "; ".join(strange))
    from transformers import CLIPConfig

    v, t = _part(cfg, "vision_cfg"), _part(cfg, "text_cfg")
    act = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    width, text_width = int(v.get("width", 768)), int(t.get("width", 512))
    vision = {
        "hidden_size": width, "intermediate_size": int(width * v.get("mlp_ratio", 4.0)), "num_hidden_layers": int(v.get("layers", 12)),
        "num_attention_heads": width // int(v.get("head_width", 64)), "image_size": v.get("image_size", 224), "patch_size": v.get("patch_size", 16),
    }  # fmt: skip
    text = {
        "hidden_size": text_width, "intermediate_size": int(text_width * t.get("mlp_ratio", 4.0)), "num_hidden_layers": int(t.get("layers", 12)),
        "num_attention_heads": int(t.get("heads", 8)), "vocab_size": int(t.get("vocab_size", 49408)),
        "max_position_embeddings": int(t.get("context_length", 77)),
        # transformers reads 2 as: the text ends at its largest id, which is what open_clip does
        "bos_token_id": None, "pad_token_id": None, "eos_token_id": 2,
    }  # fmt: skip
    shared = {"hidden_act": act, "layer_norm_eps": 1e-5, "projection_dim": int(cfg["embed_dim"])}
    return CLIPConfig(vision_config=vision | shared, text_config=text | shared, projection_dim=int(cfg["embed_dim"]), architectures=["CLIPModel"])


class AsTransformers(RenamedReader):
    """open_clip's tensors by the names of transformers' CLIP.  CheckpointError where one is missing, of another shape, or left over."""

    def __init__(self, stored: TensorReader, model: nn.Module, where: str) -> None:
        own = {name: translated(name) for name in model.state_dict(keep_vars=True)}
        super().__init__(stored, {name: there for name, (there, _) in own.items()})
        self._parts = {name: part for name, (_, part) in own.items()}
        there, wanted = set(stored.names()), set(self._names.values())
        # causal masks that older files hold
        if wrong := [*sorted(wanted - there), *sorted(there - wanted - {"attn_mask"})]:
            kind = "lacks" if wrong[0] in wanted else "holds, beside this model's,"
            raise CheckpointError(f"{where}: the file {kind} {wrong[0]} ({len(wrong)} tensors do not fit); it is of another model")
        for name, value in model.state_dict(keep_vars=True).items():
            if (shape := self._shape(name)) != tuple(value.shape):
                raise CheckpointError(f"{where}: {self._names[name]} gives {shape}, {name} is {tuple(value.shape)}; it is of another model")

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        part = self._parts[name]
        if part == "transposed":
            return value.T.contiguous()
        return value if part == "" else value.chunk(3)["qkv".index(part)].contiguous()

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as it would be given; a file's header says it."""
        there, part = self._names[name], self._parts[name]
        shape = tuple(self._reader.info(there).shape if isinstance(self._reader, SafetensorsReader) else self._reader[there].shape)
        if part == "transposed":
            return shape[::-1]
        return shape if part == "" else (shape[0] // 3, *shape[1:])


_OUTSIDE = {
    "logit_scale": ("logit_scale", ""),
    "visual_projection.weight": ("visual.proj", "transposed"),
    "text_projection.weight": ("text_projection", "transposed"),
    "vision_model.embeddings.class_embedding": ("visual.class_embedding", ""),
    "vision_model.embeddings.patch_embedding.weight": ("visual.conv1.weight", ""),
    "vision_model.embeddings.position_embedding.weight": ("visual.positional_embedding", ""),
    "text_model.embeddings.token_embedding.weight": ("token_embedding.weight", ""),
    "text_model.embeddings.position_embedding.weight": ("positional_embedding", ""),
}
_NORMS = {"vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm": "visual.ln_post", "text_model.final_layer_norm": "ln_final"}
_INSIDE = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


def translated(name: str) -> tuple[str, str]:
    """transformers' name → (open_clip's, what of it: all, "transposed", or the third that is "q", "k" or "v")."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    path, _, leaf = name.rpartition(".")
    if path in _NORMS:
        return f"{_NORMS[path]}.{leaf}", ""
    tower, _, inner = path.partition(".encoder.layers.")
    number, _, module = inner.partition(".")
    block = f"{'visual.' if tower == 'vision_model' else ''}transformer.resblocks.{number}"
    if module in _INSIDE:
        return f"{block}.{_INSIDE[module]}.{leaf}", ""
    return f"{block}.attn.in_proj_{leaf}", module.removeprefix("self_attn.")[0]


def _part(cfg: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    return cfg.get(part, {}) if part else cfg


def _on_meta(config: Any) -> nn.Module:
    from transformers import CLIPModel

    # its class embedding is drawn from the global random numbers, which are not ours
    with torch.random.fork_rng(devices=[]), parameters_on_meta():
        return CLIPModel._from_config(config).eval()


def _settings(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise NotFound(f"{path.parent} has no {path.name}") from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}); fetch it again") from e
    cfg = data.get("model_cfg") if isinstance(data, dict) else None
    if (
        not isinstance(cfg, dict)
        or not isinstance(cfg.get("embed_dim"), int)
        or not all(isinstance(cfg.get(p), dict) for p in ("vision_cfg", "text_cfg"))
    ):
        raise CheckpointError(f"{path} is no configuration of open_clip: it wants model_cfg with embed_dim, vision_cfg and text_cfg")
    return {"model_cfg": cfg, "preprocess_cfg": data.get("preprocess_cfg") or {}}


def _weights(uri: str, cfg: Mapping[str, Any], file: Path) -> TensorReader:
    kind, _, seed = str(file).partition(":")
    if kind == "random":
        if seed and not seed.isdigit():
            raise SpecError(f"{uri}: the seed of random weights is a whole number, as in @random:7, got {seed!r}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed or 0))
            model = _open_clip().model.CLIP(**cfg)
        return DictReader({name: value.detach() for name, value in model.state_dict().items()})
    if not file.is_file():
        raise NotFound(f"weights file {file} does not exist; qcore downloads none: pass a local file, or @random")
    if file.suffix == ".safetensors":
        return SafetensorsReader(file)
    try:
        # files from before torch 1.6 are no zip archives, and cannot be mapped
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as e:  # pickle and zip raise what they like
        raise CheckpointError(f"{file} cannot be read without running code ({str(e).splitlines()[0][:160]}); convert it to safetensors") from e
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(f"{file} holds no table of tensors; want the state_dict of an open_clip model")
    return DictReader({str(name).removeprefix("module."): value for name, value in found.items()})


def _open_clip() -> Any:
    try:
        import open_clip
    except ModuleNotFoundError as e:
        raise NotFound("open_clip's models are described by open_clip, which is not installed: pip install 'qplug-multimodal[open-clip]'") from e
    return open_clip
