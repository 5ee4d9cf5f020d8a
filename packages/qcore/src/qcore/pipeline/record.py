"""What a run leaves: the model that runs, and one line for each weight."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from qcore.calibration.coverage import Ledger
from qcore.model.adapter import ModelAdapter
from qcore.model.reader import TensorReader
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms.rewrite import Rewrite


@dataclass(frozen=True)
class SiteRecord:
    """What was done to one weight, and how well it went.

    error:   relative squared error of what the layer puts out, tr(ΔW G ΔWᵀ) / tr(W G Wᵀ), where the solver saw the Gram matrix G;
             else of the weight itself, ‖ΔW‖² / ‖W‖²
    of:      "output" or "weight": which of the two
    bits:    packed bits per weight, scales and fitted parts included
    remarks: what was unusual about the weight, its inputs or the way to its codes
    """

    site: str
    spec: str
    solver: str
    packing: str
    shape: tuple[int, ...]
    error: float
    of: str
    bits: float
    nbytes: int
    seconds: float
    remarks: tuple[str, ...] = ()


@dataclass
class Quantized:
    """A quantized model that runs, and the record of how it came about.

    choices: site → why an allocator chose what it did; {} without one
    """

    model: nn.Module
    topology: Topology
    adapter: ModelAdapter
    specs: dict[Site, QuantSpec]
    rewrite: Rewrite
    sites: list[SiteRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    coverage: Ledger = field(default_factory=Ledger)
    values: TensorReader | None = None  # of a streamed run: the tensors that the model has on meta
    choices: dict[str, str] = field(default_factory=dict)


def relative_error(weight: Tensor, values: Tensor, gram: Tensor | None) -> tuple[float, str]:
    """How much of the layer's output (or of the weight, without a Gram matrix) the codes lose, squared and relative."""
    delta = weight - values
    if gram is None:
        lost, whole = (float(t.double().square().sum()) for t in (delta, weight))
        return lost / max(whole, 1e-300), "weight"
    g = gram.to(weight)
    if g.ndim == 3:
        delta, weight = (t.unflatten(0, (g.shape[0], -1)) for t in (delta, weight))
    lost, whole = (float(((t @ g) * t).double().sum()) for t in (delta, weight))
    return lost / max(whole, 1e-300), "output"
