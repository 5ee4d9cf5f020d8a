"""Adapters in files, under PEFT's names, and a tuned model out of its folder.

out/adapter_config.json        PEFT's LoraConfig
out/adapter_model.safetensors  base_model.model.<path>.lora_A.weight [r, in] and lora_B.weight [out, r], float32
out/base/                      the frozen model as qcore stores it (where the recipe quantizes weights)
out/merged/                    weights and adapters together, as a float model (where it was asked for)
out/tune.json                  what was done and measured; the recipe as text
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from qcore.errors import CheckpointError
from qcore.model.layers import layout
from qcore.model.safetensors_file import SafetensorsFile, write_safetensors
from qcore.model.source import LoadedModel
from torch import Tensor, nn

from qplug_llm.gsq.model import TunedModel, adapt

PREFIX = "base_model.model."
CONFIG, WEIGHTS, RECORD, BASE, MERGED = "adapter_config.json", "adapter_model.safetensors", "tune.json", "base", "merged"


def write_adapters(tuned: TunedModel, folder: Path, *, alpha: float, base: str, transposed: bool = False) -> None:
    """Write configuration and weights of the adapters into `folder`.

    base:       name or path of the float model that the adapters belong to
    transposed: whether the model's own layers keep their weights [in, out] (transformers' Conv1D)
    """
    first = next(iter(tuned.layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets(tuned),
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / WEIGHTS, {_peft_name(n): p.detach() for n, p in tuned.parameters().items()}, {"format": "pt"})


def targets(tuned: TunedModel) -> list[str]:
    """The adapted layers as PEFT is told of them: by their last names, or whole paths where another layer has the same last name."""
    last = {path.rpartition(".")[2] for path in tuned.layers}
    others = [path for path, _ in tuned.model.named_modules() if path not in tuned.layers and path.rpartition(".")[2] in last]
    inside = [path for path in others if not any(path.startswith(f"{own}.") for own in tuned.layers)]
    return sorted(tuned.layers) if inside else sorted(last)


def _peft_name(name: str) -> str:
    return f"{PREFIX}{name}.weight"


@torch.no_grad()
def read_adapters(tuned: TunedModel, folder: Path) -> None:
    """Fill the adapters of `tuned` in place; CheckpointError where the file's are others."""
    file = SafetensorsFile(folder / WEIGHTS)
    wanted = {_peft_name(n): p for n, p in tuned.parameters().items()}
    if set(file.names()) != set(wanted):
        odd = sorted(set(file.names()) ^ set(wanted))
        raise CheckpointError(
            f"{folder / WEIGHTS}: {len(odd)} names do not meet those of the model, such as {odd[0]}; it is of another model or recipe"
        )
    for name, p in wanted.items():
        found = file[name]
        if found.shape != p.shape:
            raise CheckpointError(f"{folder / WEIGHTS}: {name} is {tuple(found.shape)}, the model wants {tuple(p.shape)}")
        p.copy_(found)


def write_merged(tuned: TunedModel, loaded: LoadedModel, folder: Path) -> None:
    """Write a float model whose adapted weights are those of weight and adapter together, in the model's own dtype; all others as they came."""
    folder.mkdir(parents=True)
    if loaded.write_companions is not None:
        loaded.write_companions(folder)
    merged = {f"{path}.weight": layer for path, layer in tuned.layers.items()}

    def value(name: str) -> Tensor:
        if name not in merged:
            return loaded.reader[name]
        own = merged[name].merged()
        return (own.T if _turned(merged[name].leaf) else own).to(loaded.dtype).contiguous()

    tensors = {name: loaded.reader[name].to("meta") for name in loaded.reader.names()}
    tensors = {name: t.to(loaded.dtype) if name in merged else t for name, t in tensors.items()}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"}, value)


def _turned(leaf: nn.Module) -> bool:
    """Whether the float layer keeps its weight [in, out]."""
    own = getattr(leaf, "transposed", None)
    if own is not None:
        return bool(own)
    weight = leaf.weight
    assert isinstance(weight, Tensor)
    probe = torch.empty(2, 3, device="meta")
    return tuple(layout(leaf).matrix(probe).shape) == (3, 2)


def turned(tuned: TunedModel) -> bool:
    return any(_turned(layer.leaf) for layer in tuned.layers.values())


def load_tuned(folder: Path | str, registry: Any = None, *, as_trained: bool = False) -> TunedModel:
    """A tuned model out of the folder that `qcore tune` wrote: base and adapters, in float32.

    as_trained: multiply in the numbers of the recipe, and not in float
    """
    from qcore.checkpoint import load
    from qcore.modules import serve_in
    from qcore.plugins import load_registry
    from qcore.recipe_file import parse_recipe

    from qplug_llm.gsq.step import FLOAT

    folder, registry = Path(folder), load_registry() if registry is None else registry
    record = read_record(folder)
    if not (folder / BASE).is_dir():
        raise CheckpointError(
            f"{folder} has no {BASE}/: its weights stayed float; open {record['model']} itself with these adapters, with PEFT for instance"
        )
    model = load(folder / BASE, registry=registry)
    serve_in(model, torch.float32)
    recipe = parse_recipe(record["recipe"]["text"], registry, record["recipe"]["name"])
    tuned = adapt(model, record["layers"], recipe, rank=record["rank"], alpha=record["alpha"], seed=record["seed"])
    read_adapters(tuned, folder)
    if not as_trained:
        for layer in tuned.layers.values():
            layer.numbers = FLOAT
    return tuned


def read_record(folder: Path) -> Mapping[str, Any]:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{folder / RECORD} cannot be read ({e}); it is no folder of `qcore tune`") from e
