"""How a folder of a vision-language model becomes a model, with what reads its pictures and text.

A folder that `save_pretrained` wrote, or `multimodal:tiny-llava`, the small trained model of this package.  Where stored names lead to the model's
one by one (also the older ones that transformers renames while it loads), tensors are read one at a time; else transformers loads the whole model,
and a note says so.  No checkpoint executes code.
"""

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.errors import CheckpointError, NotFound
from qcore.model.reader import DictReader, SafetensorsReader, TensorReader
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from torch import Tensor, nn

PREFIX = "multimodal:"
_HERE = Path(__file__).parent / "data"
_COMPANIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "words.txt",
)  # fmt: skip


class VisionLanguageFolder(ModelSource):
    """A transformers folder whose configuration has a vision tower and a language model."""

    name: ClassVar[str] = "vision-language"
    help: ClassVar[str] = "path/to/folder, multimodal:tiny-llava   a vision-language model of transformers"
    priority: ClassVar[int] = 10  # qplug-llm takes every folder with a config.json

    def matches(self, uri: str) -> bool:
        return uri.startswith(PREFIX) or _is_vision_language(Path(uri))

    def load(self, uri: str) -> LoadedModel:
        folder = _folder(uri)
        data = _config(folder)
        if "quantization_config" in data:
            raise CheckpointError(
                f"{folder} is quantized already; quantizing it again would add a second error: load the float model it was made from"
            )
        stored = SafetensorsReader(folder)
        model = self.skeleton(folder)
        dtype = stored.dtype()
        notes: tuple[str, ...] = ()
        names = stored_names(model, set(stored.names()))
        reader: TensorReader
        if names is None:
            reader = DictReader(_loaded_by_transformers(folder, type(model), dtype))
            notes = ("transformers converted the checkpoint's tensors while loading; the whole model was in memory",)
        else:
            reader = Renamed(stored, names)
            _check_shapes(model, stored, names, folder)
        from qplug_multimodal.pairs import data_of

        return LoadedModel(
            model=model,
            reader=reader,
            name=uri if uri.startswith(PREFIX) else folder.resolve().name,
            dtype=dtype,
            source=self.name,
            write_companions=lambda target: _copy_companions(folder, target),
            notes=notes,
            data=data_of(folder),
        )

    def skeleton(self, folder: Path) -> nn.Module:
        import transformers

        data = _config(folder)
        named = (data.get("architectures") or [""])[0]
        cls = getattr(transformers, named, None)
        if cls is None:
            raise CheckpointError(
                f"{folder / 'config.json'} names the architecture {named!r}, which this transformers ({transformers.__version__}) has not"
            )
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            with parameters_on_meta():
                return cls._from_config(config).eval()
        except Exception as e:  # transformers raises what it likes
            raise CheckpointError(f"{folder / 'config.json'}: transformers makes no {named} of it ({_first_line(e)})") from e

    def data(self, folder: Path) -> Any:
        from qplug_multimodal.pairs import data_of

        return data_of(folder)


class Renamed:
    """A reader whose tensors are known by other names.  names: name here → name there"""

    def __init__(self, reader: SafetensorsReader, names: dict[str, str]) -> None:
        self._reader, self._names = reader, names

    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise NotFound(f"no tensor named {name!r}; there are {len(self._names)}, such as {', '.join(list(self._names)[:3])}")
        return self._reader[self._names[name]]

    def fingerprint(self) -> str:
        from qcore.model.reader import weights_fingerprint

        return weights_fingerprint(self._reader)


def stored_names(model: nn.Module, stored: set[str]) -> dict[str, str] | None:
    """Model name → stored name for every parameter and persistent buffer, or None where they do not lead to each other one by one."""
    same: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        same.setdefault(id(value), []).append(name)
    found: dict[str, str] = {}
    for name, value in state.items():
        hit = next((n for tied in (name, *same[id(value)]) for n in _spellings(tied) if n in stored), None)
        if hit is None:
            return None
        found[name] = hit
    spare = {n for n in stored - set(found.values()) if not n.endswith(("inv_freq", "position_ids"))}
    return None if spare else found


def _spellings(name: str) -> list[str]:
    """A name as newer and older checkpoints write it."""
    short = name.removeprefix("model.")
    options = [name, short]
    if short.startswith("language_model."):
        rest = short.removeprefix("language_model.")
        options += [f"language_model.model.{rest}", f"model.{rest}"]  # LLaVA's, Qwen2-VL's
    if name.startswith("lm_head."):
        options.append(f"language_model.{name}")
    if short.startswith("vision_tower."):
        options.append(f"vision_tower.vision_model.{short.removeprefix('vision_tower.')}")
    return options


def _is_vision_language(folder: Path) -> bool:
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "vision_config" in data and any("ConditionalGeneration" in str(n) for n in data.get("architectures") or [])


def _folder(uri: str) -> Path:
    if not uri.startswith(PREFIX):
        return Path(uri)
    folder = _HERE / uri.removeprefix(PREFIX)
    if not (folder / "config.json").is_file():
        raise NotFound(f"{uri}: this package brings {', '.join(f'{PREFIX}{p.name}' for p in sorted(_HERE.iterdir()) if p.is_dir())}")
    return folder


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise NotFound(f"{folder} has no config.json") from e
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}); fetch it again") from e
    if "auto_map" in data:
        raise CheckpointError(f"{path} asks for code of its own (auto_map); a checkpoint never executes code here")
    return data


def _check_shapes(model: nn.Module, reader: SafetensorsReader, names: dict[str, str], folder: Path) -> None:
    for name, value in model.state_dict(keep_vars=True).items():
        there = list(reader.info(names[name]).shape)
        if there != list(value.shape):
            raise CheckpointError(
                f"{folder}: {names[name]} is {there}, config.json asks for {list(value.shape)}; weights and configuration are of different models"
            )


def _loaded_by_transformers(folder: Path, cls: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    try:
        model, info = cls.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except Exception as e:  # transformers raises what it likes
        raise CheckpointError(f"{folder}: transformers cannot load it ({_first_line(e)})") from e
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            raise CheckpointError(
                f"{folder}: {len(keys)} {kind.replace('_keys', '')} tensors, such as {keys[0]}; the weights are not of this config.json"
            )
    return {name: value.detach() for name, value in model.state_dict().items()}


def _copy_companions(folder: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in _COMPANIONS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _first_line(e: Exception) -> str:
    return str(e).splitlines()[0][:200] if str(e) else type(e).__name__
