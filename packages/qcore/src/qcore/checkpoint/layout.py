"""Which of two layouts a model gets on disk.

"compressed-tensors": plain `AutoModel.from_pretrained(folder)` loads it, as vLLM does.  Only for what that format can say: linear layers, symmetric
integers or E4M3, dynamic inputs, nothing else at run time.
"qcore": everything.  Its weights lie in `model.qcore.safetensors`, so a program without qcore finds no weights and says so; under the usual name,
transformers 5.23 would log one warning, leave the unknown layers random and report success.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qcore.checkpoint.manifest import LayoutName
from qcore.modules import QuantizedLinear, module_name
from qcore.numbers import FP8_E4M3, Int, Offset, PerToken, QuantSpec
from qcore.packing.compressed_tensors import CompressedFloat, CompressedInt, CompressedPack, scheme_of_weight

_FORMATS = {p.name: p.format for p in (CompressedPack, CompressedInt, CompressedFloat)}
_HOLDS = {"float32": {"float32", "float16", "bfloat16"}, "float16": {"float16"}, "bfloat16": {"bfloat16"}}
# the compressed-tensors release whose schema the config follows
SCHEMA = "0.20.0"


@dataclass(frozen=True)
class Layout:
    """The layout, and what stood against the more portable one."""

    name: LayoutName
    reasons: tuple[str, ...] = ()


def layout_for(model: nn.Module, modules: Mapping[str, type]) -> Layout:
    """The portable "compressed-tensors" if it can hold all of `model`, else "qcore" with every reason.

    modules: classes by name, as of the registry
    """
    reasons = []
    found = [(path, m) for path, m in model.named_modules() if module_name(m, modules) is not None]
    dtype = model_dtype(model)
    for path, m in found:
        if reason := _stands_against(m, dtype):
            reasons.append(f"{path}: {reason}")
    formats = {_FORMATS[m.packing.name] for _, m in found if isinstance(m, QuantizedLinear) and m.packing.name in _FORMATS}
    if len(formats) > 1:
        reasons.append(f"layers of several formats: {', '.join(sorted(formats))}")
    return Layout("qcore", tuple(reasons)) if reasons else Layout("compressed-tensors")


def _stands_against(m: nn.Module, dtype: str) -> str | None:
    if type(m) is not QuantizedLinear:
        return f"a {type(m).name} is no linear layer"  # type: ignore[attr-defined]
    if m.transposed:
        return "transformers' Conv1D is no nn.Linear to compressed-tensors"
    if m.packing.name not in _FORMATS:
        return f"packing {m.packing.name!r} is none of {', '.join(_FORMATS)}"
    if m.online is not None:
        return f"an online {type(m.online).__name__} stands before it"
    if m.activation is not None and scheme_of_input(m.activation) is None:
        return f"inputs {m.activation} are not dynamic, symmetric and per token"
    if m.activation is not None and m.packing.name == CompressedPack.name:
        return "pack-quantized weights have float inputs"
    if m.spec.scale not in _HOLDS.get(dtype, set()):
        return f"scales of {m.spec.scale} would be rounded to {dtype}, the model's dtype, by the loader"
    return None


def scheme_of_input(spec: QuantSpec) -> dict[str, Any] | None:
    """The `input_activations` entry of a scheme; None where compressed-tensors has none."""
    if spec.when != "dynamic" or spec.offset is not Offset.NONE or not isinstance(spec.granularity, PerToken):
        return None
    if not (isinstance(spec.format, Int) and spec.format.signed and spec.format.bits == 8) and spec.format != FP8_E4M3:
        return None
    kind = "int" if isinstance(spec.format, Int) else "float"
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


def compressed_tensors_config(model: nn.Module) -> dict[str, Any] | None:
    """`quantization_config` of a model in the compressed-tensors layout; None where nothing is quantized.

    One scheme for all is written as the class target "Linear" with the float layers ignored, which is what serving programs expect of fused
    layers; several schemes name their modules.
    """
    quantized = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not quantized:
        return None
    groups: dict[str, dict[str, Any]] = {}
    for path, m in quantized.items():
        scheme = {
            "weights": scheme_of_weight(m.spec),
            "input_activations": None if m.activation is None else scheme_of_input(m.activation),
            "output_activations": None,
            "format": _FORMATS[m.packing.name],
        }
        group = groups.setdefault(repr(scheme), {"targets": [], **scheme})
        group["targets"].append(path)
    if len(groups) == 1:
        next(iter(groups.values()))["targets"] = ["Linear"]
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(groups.values()))["format"],
        "quantization_status": "compressed",
        "version": SCHEMA,
        "ignore": [path for path, m in model.named_modules() if isinstance(m, nn.Linear)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
    }


def model_dtype(model: nn.Module) -> str:
    """The dtype that most float parameters have, counted in values; float32 where there are none."""
    counts: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if p.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return str(max(counts, key=lambda d: counts[d])).removeprefix("torch.") if counts else "float32"
