"""DULUT in a model: the module that looks functions up, and the transform that puts it where activation functions are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from qcore.calibration import Seen
from qcore.errors import SpecError
from qcore.model import Site, TensorReader, Topology
from qcore.numbers import QuantSpec
from qcore.transforms import Rewrite, Transform
from qcore.transforms.rewrite import Insert, ModuleConfig
from torch import Tensor, nn

from qplug_perception.petr.dulut import FUNCTIONS, Tables, build, fixed_cascade, fraction_bits, tails


class TableLookup(nn.Module):
    """y = T2(T1(x)) for every number, T1 in fixed point.

    function:      "silu", "gelu", "gelu-tanh", "exp", "sigmoid"; says what is beyond the range
    low, high:     the range of T1
    first, second: [n1] int32, places in T2 · 2^fraction, and [n2] float32, values; buffers
    fraction:      bits behind the point of `first`; 0 = log2(n2) + 8, which is the least
    """

    name: ClassVar[str] = "dulut"
    first: Tensor
    second: Tensor

    def __init__(self, function: str, low: float, high: float, first: Tensor, second: Tensor, fraction: int = 0) -> None:
        super().__init__()
        least = fraction_bits(len(second))
        fraction = fraction or least
        if function not in FUNCTIONS:
            raise SpecError(f"no table is known for {function!r}; have: {', '.join(FUNCTIONS)}")
        if not least <= fraction <= 24:
            raise SpecError(f"places in a table of {len(second)} entries have {least} to 24 bits behind the point, got fraction={fraction}")
        self.function, self.low, self.high, self.fraction = function, low, high, fraction
        self.register_buffer("first", first)
        self.register_buffer("second", second)

    @classmethod
    def of(cls, tables: Tables, fraction: int = 0) -> Self:
        """Built tables, rounded."""
        bits = fraction or fraction_bits(len(tables.second))
        return cls(tables.function, tables.low, tables.high, (tables.first * (1 << bits)).round().to(torch.int32), tables.second.float(), bits)

    def forward(self, x: Tensor) -> Tensor:
        return fixed_cascade(x, self.first, self.second, self.fraction, self.low, self.high, tails(self.function))

    def config(self) -> dict[str, Any]:
        entries = [len(self.first), len(self.second)]
        return {"function": self.function, "low": self.low, "high": self.high, "entries": entries, "fraction": self.fraction}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        n1, n2 = config["entries"]
        empty = torch.zeros(n1, dtype=torch.int32), torch.zeros(n2)
        return cls(config["function"], config["low"], config["high"], *empty, config["fraction"])

    def extra_repr(self) -> str:
        return f"{self.function} over [{self.low:g}, {self.high:g}], {len(self.first)} + {len(self.second)} entries"


def function_of(module: nn.Module) -> str | None:
    """Which table stands for an activation function; None for others."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu-tanh"
    return {nn.SiLU: "silu", nn.Sigmoid: "sigmoid"}.get(type(module))


@dataclass(frozen=True)
class DULUT(Transform):
    """Look up SiLU, GELU and sigmoid, wherever they are modules.  exp is looked up inside the softmax: see `QANS`.

    Functions that a forward pass calls without a module (F.silu) are not reached, and stay float.

    first, second: entries of the two tables
    low, high:     their range; beyond it SiLU and GELU are 0 and x, a sigmoid keeps its last value
    """

    name: ClassVar[str] = "dulut"
    exact: ClassVar[bool] = False
    first: int = 32
    second: int = 32
    low: float = -8.0
    high: float = 8.0

    def __post_init__(self) -> None:
        build("silu", self.low, self.high, self.first, self.second)  # before the long computation

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        inserts, largest = {}, 0.0
        for block in topology.blocks:
            for path, module in model.get_submodule(block.module).named_modules(prefix=block.module):
                if (function := function_of(module)) is not None:
                    tables = build(function, self.low, self.high, self.first, self.second)
                    inserts[path] = insert_of(TableLookup.of(tables))
                    largest = max(largest, tables.error)
        # what a table's error becomes at the outputs depends on the layers behind it; 0.1 is what this transform answers for, not what is expected
        return Rewrite(inserts=inserts, exact=0.1 if inserts else 1e-9)


def insert_of(module: TableLookup) -> Insert:
    """The rewrite's entry that puts a copy of the module in a place."""
    return Insert(ModuleConfig(module.name, module.config(), dict(module.state_dict())), "instead")
