"""How much memory a fine-tuning with low-rank adapters takes, in closed form.

Counted: frozen weights, adapters with their gradients and moments, and what linear layers keep of their inputs.  Not counted: what other operators
keep (norms, attention, the nonlinearity of an MLP: they are the same in every number format), embeddings, and work space.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qcore.errors import SpecError


def shared_exponent_bits(bits: int, group: int = 32, exponent: int = 5) -> float:
    """Bits of a value of integers under a shared exponent: bits + exponent / group.  5 + 5/32 = 5.16"""
    return bits + exponent / group


@dataclass(frozen=True)
class LinearShape:
    """One adapted layer.  alone: it keeps its input; False = another layer of the list keeps it for both (q for k and v, gate for up)"""

    out: int
    into: int
    alone: bool = True


@dataclass(frozen=True)
class TuningBytes:
    """Bytes of each part."""

    weights: float
    adapters: float
    gradients: float
    states: float
    saved: float

    @property
    def total(self) -> float:
        return self.weights + self.adapters + self.gradients + self.states + self.saved


def tuning_bytes(
    layers: Sequence[LinearShape],
    rank: int,
    tokens: int,
    *,
    weight_bits: float,
    saved_bits: float,
    adapter_bits: float = 32,
    gradient_bits: float = 32,
    state_bits: float = 32,
) -> TuningBytes:
    """The closed form, with n = Σ rank · (N + K) numbers of adapters:

        weights   Σ N·K · weight_bits / 8
        adapters  n · adapter_bits / 8,  gradients  n · gradient_bits / 8,  states  2 · n · state_bits / 8
        saved     tokens · (Σ K of the inputs that are kept + Σ rank) · saved_bits / 8

    tokens: of one forward pass.  LoRA in bfloat16 keeps 16 bits of everything but moments; where weights dominate the ratio to it tends to
    16 / weight_bits: 1.96 for GSE-INT8, 3.88 for NF4 in groups of 64 with 8-bit scales.
    """
    if rank < 1 or tokens < 0 or not layers:
        raise SpecError(f"memory of tuning: wants layers, a rank of at least 1 and tokens of 0 or more, got {len(layers)}, {rank} and {tokens}")
    numbers = rank * sum(s.out + s.into for s in layers)
    kept = sum(s.into for s in layers if s.alone) + rank * len(layers)
    return TuningBytes(
        weights=sum(s.out * s.into for s in layers) * weight_bits / 8,
        adapters=numbers * adapter_bits / 8,
        gradients=numbers * gradient_bits / 8,
        states=2 * numbers * state_bits / 8,
        saved=tokens * kept * saved_bits / 8,
    )
