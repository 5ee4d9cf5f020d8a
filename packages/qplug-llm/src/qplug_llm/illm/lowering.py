"""From a quantized Llama-like decoder to a program of integers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from qcore.checkpoint.lowering import Lowering, stored_weights
from qcore.errors import SpecError
from qcore.model.topology import Site, Topology
from qcore.modules import QuantizedLinear, StoredWeight
from qcore.numbers import Int, Offset, PerChannel, PerToken, QTensor, QuantSpec, quantize
from qcore.numbers.spec import int_weight
from torch import Tensor, nn

from qplug_llm.illm.decoder import IntegerAttention, IntegerBlock, IntegerDecoder, IntegerLinear, IntegerMLP, IntegerNorm, Widths
from qplug_llm.illm.dyadic import Wide, constant, dyadic_scale, dyadic_weight
from qplug_llm.illm.operators import ROPE_BITS
from qplug_llm.illm.reading import PROJECTIONS, differs, eps_of, foreign, linears_of, rotary_tables, shape_of
from qplug_llm.illm.swiglu_smooth import SplitSiLU

_GAIN_BITS = 16


@dataclass(frozen=True)
class ILLM(Lowering):
    """I-LLM: a quantized Llama-like decoder with integer codes alone between token ids and logits.

    Weights are taken as they are stored, codes and bfloat16 scales (which are dyadic numbers); gains of norms become 16-bit integers, rotary tables
    int16; embedding and head, of which recipes do not speak, are rounded to nearest.  A bit width of an input is that of the layer's own spec.

    widths:    what a recipe does not say
    positions: the longest text; None = as long as the model's config allows

    Source: https://arxiv.org/abs/2405.17849.
    """

    name: ClassVar[str] = "i-llm"
    widths: Widths = field(default_factory=Widths)
    positions: int | None = None

    def refuses(self, model: nn.Module, topology: Topology, weights: Mapping[Site, QTensor]) -> list[str]:
        found = foreign(model)
        if found:
            return found
        found += [why for path in linears_of(model) if (why := _refused(path, model.get_submodule(path), weights.get(Site(path))))]
        found += _mixed_inputs(model) if not found else []
        for path in ("model.embed_tokens", "lm_head"):
            module = model.get_submodule(path)
            if isinstance(module, StoredWeight):
                found += [why] if (why := _wrong_weight(path, module.spec)) else []
            elif getattr(module, "bias", None) is not None:
                found.append(f"{path} has a bias")
        if (why := differs(model)) is not None:
            found.append(why)
        return found

    def lower(self, model: nn.Module, topology: Topology, weights: Mapping[Site, QTensor]) -> IntegerDecoder:
        if reasons := self.refuses(model, topology, weights):
            raise SpecError(f"{type(model).__name__} cannot be lowered to integers:\n  " + "\n  ".join(reasons))
        w, shape = self.widths, shape_of(model)
        linears = {
            path: IntegerLinear(dyadic_weight(weights[Site(path)], path), _input_bits(model.get_submodule(path))) for path in linears_of(model)
        }
        # 1/√D with 15 bits: with 8 bits every score would be up to 0.2 % off
        m, e = _fifteen_bits(shape.dim**-0.5)
        blocks = []
        for name, block in model.get_submodule("model.layers").named_children():
            at = f"model.layers.{name}"
            attention = IntegerAttention({k: linears[f"{at}.self_attn.{n}"] for k, n in PROJECTIONS.items()}, shape.heads, (m, e), w)
            act: Any = block.get_submodule("mlp.act_fn")
            smooth = constant(act.s.double(), _GAIN_BITS) if isinstance(act, SplitSiLU) else None
            gate, up, down = (linears[f"{at}.mlp.{n}_proj"] for n in ("gate", "up", "down"))
            mlp = IntegerMLP(gate, up, down, smooth, w)
            norms = [self._norm(block.get_submodule(n), f"{at}.{n}") for n in ("input_layernorm", "post_attention_layernorm")]
            blocks.append(IntegerBlock(norms[0], attention, norms[1], mlp, w))
        outer = [IntegerLinear(dyadic_weight(self._outside(model.get_submodule(p)), p), w.outside) for p in ("model.embed_tokens", "lm_head")]
        positions = self.positions or int(getattr(model.config, "max_position_embeddings", 2048))
        cos, sin = (_int16(t) for t in rotary_tables(model, positions))
        return IntegerDecoder(outer[0], blocks, self._norm(model.get_submodule("model.norm"), "model.norm"), outer[1], cos, sin, w).eval()

    def _norm(self, norm: nn.Module, where: str) -> IntegerNorm:
        eps, gain = eps_of(norm), norm.get_parameter("weight").detach().double()
        if not self.widths.epsilon or eps == 0:
            return IntegerNorm(constant(gain, _GAIN_BITS), None)
        m, k = dyadic_scale(torch.tensor([eps]).bfloat16(), where)
        return IntegerNorm(constant(gain, _GAIN_BITS), (int(m), int(k)))

    def _outside(self, module: nn.Module) -> QTensor:
        if isinstance(module, StoredWeight):
            return module.qtensor()
        return quantize(module.get_parameter("weight").detach().float(), int_weight(self.widths.outside, scale="bfloat16"))


def lower(model: Any, widths: Widths | None = None, positions: int | None = None) -> IntegerDecoder:
    """The integer program of a quantized Llama-like decoder.

    model:     what `quantize_model` returned, or the module that `qcore.load` gave; it is left as it is
    widths:    bits of what the recipe does not speak of; `PAPER` for the paper's
    positions: the longest text; None = as long as the model's config allows
    SpecError with every reason why it cannot be.
    """
    own: nn.Module = model if isinstance(model, nn.Module) else model.model
    return ILLM(widths or Widths(), positions).lower(own, Topology(()), stored_weights(own))


# what can be taken over ------------------------------------------------------------------------------------------------------------------


def _refused(path: str, module: nn.Module, weight: QTensor | None) -> str | None:
    if not isinstance(module, QuantizedLinear) or weight is None:
        return f"{path} is {type(module).__name__}, not quantized; let a rule cover it, as recipe illm-w8a8 does"
    if why := _wrong_weight(path, weight.spec):
        return why
    if module.bias is not None:
        return f"{path} has a bias, which DI-MatMul does not add"
    if module.online is not None:
        return f"{path} has a module before it ({type(module.online).__name__}) that computes with floats"
    spec = module.activation
    if spec is None:
        return f"{path} reads floats; give *:input a rule, as recipe illm-w8a8 does"
    if not (isinstance(spec.format, Int) and spec.format.bits >= 2 and spec.granularity == PerToken() and spec.when == "dynamic"):
        return f"{path} reads {spec}; the integer program finds the range of every token when it runs: int, granularity 'token', when 'dynamic'"
    if spec.offset is not Offset.CODE:
        return f"{path} reads {spec} without a zero point; the integer program has one for every token: offset 'code'"
    return None


def _wrong_weight(path: str, spec: QuantSpec) -> str | None:
    if not (isinstance(spec.format, Int) and spec.format.bits >= 2 and spec.granularity == PerChannel(0) and spec.offset is not Offset.VALUE):
        return f"{path} is stored as {spec}; products have one scale for each output channel: int of 2 to 8 bits, granularity 'channel'"
    if spec.scale != "bfloat16":
        return f"{path} has scales in {spec.scale}; bfloat16 ones are dyadic numbers with 8-bit m, others would be rounded again: scale 'bfloat16'"
    return None


def _input_bits(module: nn.Module) -> int:
    assert isinstance(module, QuantizedLinear) and module.activation is not None
    return int(module.activation.format.bits)


def _mixed_inputs(model: nn.Module) -> list[str]:
    """Layers that read the same codes, and want them in different widths."""
    found = []
    for name, _ in model.get_submodule("model.layers").named_children():
        at = f"model.layers.{name}"
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            if len(bits := {n: _input_bits(model.get_submodule(f"{at}.{n}")) for n in group}) and len(set(bits.values())) > 1:
                found.append(f"{at}: {', '.join(f'{n} reads {b} bits' for n, b in bits.items())}, but they read the same codes")
    return found


def _fifteen_bits(value: float) -> tuple[int, int]:
    wide: Wide = constant(torch.tensor([value]), 16)
    return int(wide.x), int(wide.k)


def _int16(table: Tensor) -> Tensor:
    codes = torch.ldexp(table, torch.tensor(ROPE_BITS)).round()
    if float(codes.abs().max()) > 2**15 - 1:
        raise SpecError(f"rotary tables reach {float(table.abs().max()):.3g}, which int16 in units of 2^-{ROPE_BITS} does not hold")
    return codes.to(torch.int16)
