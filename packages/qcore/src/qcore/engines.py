"""What programs that serve checkpoints make of a plan: what they cannot load, and over how many devices they can split it.

Limits are those of the programs' own sources in 2026: vLLM's compressed-tensors schemes (weight-only: 4 or 8 bits, channels or groups of 32, 64, 128;
Marlin's tiles of 64 outputs by 128 inputs) and its fused q/k/v and gate/up layers; llama.cpp's blocks of 32; ONNX Runtime's MatMulNBits.  Parallel
layers are known by the names of the Llama family; of other names nothing is said.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qcore.numbers import Int, Offset, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec
from qcore.numbers.granularity import Shape

DEGREES = (1, 2, 4, 8)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
COLUMN = {name for group in FUSED for name in group}  # split by outputs
ROW = {"o_proj", "down_proj"}  # split by inputs
_COMPRESSED = {"ct-pack", "ct-int", "ct-float"}
_MARLIN = (64, 128)  # outputs, inputs of a tile


@dataclass(frozen=True)
class Weight:
    """One weight of a plan.  module: path of its layer; spec None = it stays float"""

    module: str
    shape: Shape
    spec: QuantSpec | None
    activation: QuantSpec | None = None
    packing: str = ""

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class Verdict:
    """What one program makes of the planned checkpoint.

    reasons:  why it cannot load it; none = it can
    notes:    what it does, but perhaps not as hoped
    parallel: devices → why it cannot be split over so many; {} where the program does not split layers
    """

    engine: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    parallel: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def problems(self, devices: int = 1) -> tuple[str, ...]:
        """What stands against serving it with this program on so many devices."""
        if self.parallel and devices not in self.parallel:
            return (*self.reasons, f"tensor parallelism over {devices} was not judged; have: {', '.join(map(str, self.parallel))}")
        if not self.parallel and devices > 1 and not self.reasons:
            return (f"{self.engine} does not split layers over devices, or has no layers that qcore knows to be split",)
        return (*self.reasons, *self.parallel.get(devices, ()))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "engine": self.engine,
            "loads": not self.reasons,
            "reasons": list(self.reasons),
            "notes": list(self.notes),
            "parallel": {str(n): list(why) for n, why in self.parallel.items()},
        }


def transformers(weights: Sequence[Weight], config: Any) -> Verdict:
    """Plain `from_pretrained`, without qcore."""
    return Verdict("transformers", _not_portable(weights), (), {})


def vllm(weights: Sequence[Weight], config: Any) -> Verdict:
    """vLLM's own loader of compressed-tensors."""
    reasons = _not_portable(weights) or (*_grouped(weights, _vllm_scheme), *_fused_apart(weights))
    notes = (*_grouped(weights, _marlin), *_grouped(weights, _one_scale))
    return Verdict("vLLM", reasons, notes, {} if reasons else _parallel(weights, config))


def llama_cpp(weights: Sequence[Weight], config: Any) -> Verdict:
    """llama.cpp reads GGUF, which qcore does not write."""
    return Verdict(
        "llama.cpp",
        ("it reads GGUF, which qcore does not write; its converter takes checkpoints in the compressed-tensors layout", *_grouped(weights, _blocks)),
    )


def onnxruntime(weights: Sequence[Weight], config: Any) -> Verdict:
    """ONNX Runtime reads ONNX, which qcore writes for convolutional networks."""
    return Verdict("ONNX Runtime", ("it reads ONNX, which qcore does not write for language models", *_grouped(weights, _nbits)))


ENGINES: Mapping[str, Callable[[Sequence[Weight], Any], Verdict]] = {
    "transformers": transformers,
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "onnxruntime": onnxruntime,
}


def _grouped(weights: Sequence[Weight], why: Callable[[Weight], str | None]) -> tuple[str, ...]:
    """What `why` says, once for all weights of which it says the same."""
    said: dict[str, list[str]] = {}
    for w in weights:
        if w.spec is not None and (reason := why(w)) is not None:
            said.setdefault(reason, []).append(w.module)
    return tuple(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}" for reason, names in said.items())


def _not_portable(weights: Sequence[Weight]) -> tuple[str, ...]:
    """What keeps the checkpoint from the layout that others read."""

    def why(w: Weight) -> str | None:
        if w.packing not in _COMPRESSED:
            return f"packing {w.packing!r} is none of compressed-tensors'; `import qcore.hf` loads it into transformers"
        a = w.activation
        if a is None:
            return None
        if w.packing == "ct-pack":
            return "pack-quantized weights have float inputs"
        if a.when != "dynamic" or a.offset is not Offset.NONE or not isinstance(a.granularity, PerToken):
            return f"inputs {a} are not dynamic, symmetric and per token; `import qcore.hf` loads them into transformers"
        return None

    packings = {w.packing for w in weights if w.spec is not None} & _COMPRESSED
    several = (f"layers of several formats ({', '.join(sorted(packings))}) are one file of none",) if len(packings) > 1 else ()
    return (*_grouped(weights, why), *several)


def _vllm_scheme(w: Weight) -> str | None:
    assert w.spec is not None
    g, bits = w.spec.granularity, w.spec.format.bits
    if w.packing == "ct-pack":
        if bits not in (4, 8):
            return f"vLLM serves weight-only integers of 4 or 8 bits, got {bits}"
        if isinstance(g, PerGroup) and g.size not in (32, 64, 128):
            return f"vLLM serves groups of 32, 64 or 128, got {g.size}"
    if w.packing == "ct-int" and not isinstance(g, PerChannel | PerTensor):
        return f"vLLM serves int8 weights per channel or tensor, got {w.spec}"
    if w.packing == "ct-int" and w.activation is None:
        return "vLLM serves int8 weights in the int-quantized layout with int8 inputs"
    return None


def _marlin(w: Weight) -> str | None:
    outputs, inputs = w.shape
    if w.packing != "ct-pack" or (outputs % _MARLIN[0] == 0 and inputs % _MARLIN[1] == 0):
        return None
    return f"[{outputs}, {inputs}] is no multiple of Marlin's tile of {_MARLIN[0]} × {_MARLIN[1]}: vLLM takes a slower kernel, or none"


def _one_scale(w: Weight) -> str | None:
    """Fused layers have one scale for the whole where each part came with one of its own."""
    assert w.spec is not None
    if w.packing == "ct-float" and isinstance(w.spec.granularity, PerTensor) and any(w.name in names for names in FUSED):
        return "vLLM fuses it with its neighbours and rounds it anew under the largest of their scales; a scale per channel is kept as it is"
    return None


def _blocks(w: Weight) -> str | None:
    return f"its blocks of 32 do not divide K={w.shape[1]}" if w.shape[1] % 32 else None


def _nbits(w: Weight) -> str | None:
    assert w.spec is not None
    g = w.spec.granularity
    if not isinstance(w.spec.format, Int) or w.spec.format.bits not in (2, 4, 8):
        return f"MatMulNBits holds integers of 2, 4 or 8 bits, got {w.spec.format}"
    if isinstance(g, PerGroup) and (g.size < 16 or g.size & (g.size - 1)):
        return f"MatMulNBits has blocks of a power of two from 16 on, got {g.size}"
    return None


def _fused_apart(weights: Sequence[Weight]) -> tuple[str, ...]:
    """Layers that vLLM fuses into one must be stored alike."""
    found: dict[tuple[str, ...], dict[str, QuantSpec | None]] = {}
    for w in weights:
        for names in FUSED:
            if w.name in names:
                found.setdefault((w.module.rpartition(".")[0], *names), {})[w.name] = w.spec
    apart = [(parent, specs) for (parent, *_), specs in found.items() if len(set(specs.values())) > 1]
    if not apart:
        return ()
    parent, specs = apart[0]
    listed = ", ".join(f"{name} {'float' if spec is None else spec}" for name, spec in specs.items())
    more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
    return (f"{parent}{more}: vLLM fuses {' and '.join(specs)} into one layer, which must be stored alike, got {listed}",)


def _parallel(weights: Sequence[Weight], config: Any) -> dict[int, tuple[str, ...]]:
    """Devices → what does not divide."""
    if not any(w.name in COLUMN | ROW for w in weights):
        return {}
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads

    def over(n: int) -> tuple[str, ...]:
        said = []
        if heads and heads % n:
            said.append(f"{heads} attention heads are not divided by {n}")
        if kv_heads and kv_heads % n and n % kv_heads:
            said.append(f"{kv_heads} key-value heads neither divide nor are divided by {n}")

        def why(w: Weight) -> str | None:
            assert w.spec is not None
            outputs, inputs = w.shape
            if w.name in COLUMN and outputs % n and not (w.name in ("k_proj", "v_proj") and kv_heads and n % kv_heads == 0):
                return f"{outputs} outputs are not divided by {n}"
            if w.name not in ROW:
                return None
            if inputs % n:
                return f"{inputs} inputs are not divided by {n}"
            g = w.spec.granularity
            if isinstance(g, PerGroup) and (inputs // n) % g.size:
                return f"{inputs} inputs over {n} devices leave {inputs // n} each, which groups of {g.size} do not divide"
            return None

        return (*said, *_grouped(weights, why))

    return {n: over(n) for n in DEGREES}
