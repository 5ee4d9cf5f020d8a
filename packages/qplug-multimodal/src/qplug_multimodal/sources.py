"""How a folder of a vision-language model becomes a model, with what reads its pictures and text.

A folder that `save_pretrained` wrote, or `multimodal:tiny-llava`, the small trained model of this package.  Where stored names lead to the model's
one by one (also the older ones that transformers renames while it loads), tensors are read one at a time; else transformers loads the whole model,
and a note says so.  No checkpoint executes code.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.errors import CheckpointError, NotFound
from qcore.model.reader import DictReader, SafetensorsReader, TensorReader
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from qcore.model.transformers_folder import RenamedReader, check_shapes, copy_files, first_line, read_config, require_float, whole_state
from torch import nn

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
        require_float(read_config(folder), folder)
        stored = SafetensorsReader(folder)
        model = self.skeleton(folder)
        dtype = stored.dtype()
        notes: tuple[str, ...] = ()
        names = stored_names(model, set(stored.names()))
        reader: TensorReader
        if names is None:
            reader = DictReader(whole_state(type(model), folder, dtype))
            notes = ("transformers converted the checkpoint's tensors while loading; the whole model was in memory",)
        else:
            reader = RenamedReader(stored, names)
            check_shapes(model, stored, names, folder)
        from qplug_multimodal.pairs import data_of

        return LoadedModel(
            model=model,
            reader=reader,
            name=uri if uri.startswith(PREFIX) else folder.resolve().name,
            dtype=dtype,
            source=self.name,
            write_companions=lambda target: copy_files(folder, target, _COMPANIONS),
            notes=notes,
            data=data_of(folder),
        )

    def skeleton(self, folder: Path) -> nn.Module:
        import transformers

        data = read_config(folder)
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
            # a CLIP tower draws its class embedding from the global random numbers, which are not ours
            with torch.random.fork_rng(devices=[]), parameters_on_meta():
                return cls._from_config(config).eval()
        except Exception as e:  # transformers raises what it likes
            raise CheckpointError(f"{folder / 'config.json'}: transformers makes no {named} of it ({first_line(e)})") from e

    def data(self, folder: Path) -> Any:
        from qplug_multimodal.pairs import data_of

        return data_of(folder)


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
