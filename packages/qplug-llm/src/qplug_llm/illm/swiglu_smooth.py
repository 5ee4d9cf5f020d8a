"""The one equivalence of FSBR that no link holds: scales through SwiGLU.

    SwiGLU(x₁, x₂) = x₁·σ(x₁)·x₂ = (x₁s)·σ((x₁s)/s)·(x₂/s)

The gate's rows are multiplied by s and those of up divided by it; σ alone must see what it saw before, so the activation function becomes x·σ(x∘1/s).
FSBR's other pairs (norm → linear, value → output, up → down, query and key by rotary pair) are links, which `smoothquant` and `learn-static` scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import Gram
from qcore.errors import SpecError
from qcore.model.reader import TensorReader
from qcore.model.topology import Port, Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.channels import seen_at
from qcore.transforms.rewrite import Insert, ModuleConfig, Rewrite, Scale
from torch import Tensor, nn

GATE, UP, ACTIVATION = "gate_proj", "up_proj", "act_fn"


class SplitSiLU(nn.Module):
    """x·σ(x ∘ s): SiLU whose input was divided by s, and whose output somebody else's weights multiply by it.  s: [C], a buffer"""

    name: ClassVar[str] = "split-silu"
    s: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("s", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * self.s.to(x.dtype))

    def config(self) -> dict[str, Any]:
        return {"channels": self.s.shape[0]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["channels"])


def is_silu(module: nn.Module) -> bool:
    """Whether the module is x·σ(x), by what it computes."""
    probe = torch.linspace(-9, 9, 37, dtype=torch.float64)
    try:
        return not any(True for _ in module.parameters()) and torch.allclose(module(probe), probe * probe.sigmoid(), rtol=1e-9, atol=1e-12)
    except Exception:  # whatever a foreign module raises: it is something else
        return False


def split_swiglu(block: str, s: Tensor) -> Rewrite:
    """Multiply the gate's channels of the MLP at path `block` by s, divide those of up, and tell σ.  s: [C] positive"""
    s = s.double()
    edits = {
        f"{block}.{GATE}.weight": (Scale(Port(f"{block}.{GATE}.weight", "out"), s),),
        f"{block}.{UP}.weight": (Scale(Port(f"{block}.{UP}.weight", "out"), 1 / s),),
    }
    config = ModuleConfig(SplitSiLU.name, {"channels": s.shape[0]}, {"s": (1 / s).float()})
    return Rewrite(edits=dict(edits), inserts={f"{block}.{ACTIVATION}": Insert(config, "instead")})


@dataclass(frozen=True)
class SwiGLUSmooth(Transform):
    """Give gate and up, which SwiGLU multiplies, the same size in every channel: s = (rms(up) / rms(gate))^alpha.

    Both are requantized for each token on the way into DI-SwiGLU, so a channel of one that is a hundred times the others takes their levels.
    Sizes are root mean squares of the outputs on calibration data, √(w G wᵀ) by the Gram matrix G of the shared input.  A channel that never fires
    keeps s = 1.  Where gate and up reach SwiGLU with 16 bits, as `qplug_llm.illm.Widths` has it, nothing is gained; with the paper's 8 bits it is.

    alpha: 0.5 makes both sizes equal to their geometric mean

    Source: https://arxiv.org/abs/2405.17849, section 3.2 (non-linear act-smooth).  Differs: the paper learns s with all other scales; here it is this
    initial value, because the core's learner rounds what linear layers read, not what they put out, and gives s no gradient.
    """

    name: ClassVar[str] = "swiglu-smooth"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"alpha lies between 0 (nothing moves) and 1 (all goes to the gate), got {self.alpha}")

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {site.input: (Gram(),) for site in _gates(topology, specs)}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite, notes = Rewrite(), []
        for site in _gates(topology, specs):
            block = site.module.removesuffix(f".{GATE}")
            mlp = model.get_submodule(block)
            activation, up = getattr(mlp, ACTIVATION, None), getattr(mlp, UP, None)
            if activation is None or up is None or not is_silu(activation) or any(getattr(m, "bias", None) is not None for m in (mlp.gate_proj, up)):
                notes.append(f"{self.name}: {block} is no SwiGLU of {GATE}, {UP} and {ACTIVATION} without biases; left as it is")
                continue
            gram = seen_at(site.input, Gram.name, seen).double()
            gate, up = (_size(reader[f"{block}.{name}.weight"].double(), gram) for name in (GATE, UP))
            alive = (gate > 0) & (up > 0)
            s = torch.where(alive, torch.where(alive, up, 1.0) / torch.where(alive, gate, 1.0), 1.0) ** self.alpha
            rewrite = rewrite.then(split_swiglu(block, s))
        rewrite.notes = tuple(notes)
        return rewrite


def _gates(topology: Topology, specs: Mapping[Site, QuantSpec]) -> list[Site]:
    return [s for s in topology.sites if s in specs and s.part is None and s.module.endswith(f".{GATE}")]


def _size(w: Tensor, gram: Tensor) -> Tensor:
    """Root mean square of each output channel.  [N, K], [K, K] → [N]"""
    return ((w @ gram) * w).sum(-1).clamp(min=0).sqrt()
