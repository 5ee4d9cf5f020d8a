"""What a plan is made of: the model, the recipe, and the problems and notes that are gathered."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from qcore.model.reader import tied_groups
from qcore.model.source import LoadedModel
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec
from qcore.numbers.granularity import Shape
from qcore.plan.sizes import packed_bytes
from qcore.plugins import Registry
from qcore.recipe import Recipe


@dataclass
class Case:
    """What is planned, and what was found against it so far; the fields are the arguments of `make_plan`."""

    loaded: LoadedModel
    recipe: Recipe
    topology: Topology
    registry: Registry
    has_data: bool
    device: torch.device
    max_ram: int | None = None
    stream: bool = False
    eval_tokens: int = 0
    processes: int = 1
    engine: str | None = None
    tensor_parallel: int = 1
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    alike: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.loaded.model
        self.sites = self.topology.sites
        self.all_sites = [s for site in self.sites for s in (site, site.input)] + list(self.topology.activations)
        self.specs = self.recipe.wishes(self.topology, str(self.loaded.dtype).removeprefix("torch."))
        self.groups = tied_groups(self.model)
        self.packings = {name: cls() for name, cls in self.registry.packings.items()}
        self.kernels = [cls() for cls in self.registry.kernels.values()]
        self.sizes: dict[tuple[QuantSpec, Shape, str], int] = {}
        self.itemsize = self.loaded.dtype.itemsize

    def packed_bytes(self, packing: Any, spec: QuantSpec, shape: Shape) -> int:
        key = (spec, shape, packing.name)
        if key not in self.sizes:
            self.sizes[key] = packed_bytes(packing, spec, shape)
        return self.sizes[key]

    def solver(self, site: Site) -> Any:
        rule = self.recipe.rule_for(site)
        return rule.solver if rule is not None and rule.solver is not None else self.recipe.solver

    @property
    def static(self) -> list[Site]:
        """The activations whose scales are found while calibrating."""
        inputs = [site.input for site in self.sites if site in self.specs]
        return [s for s in dict.fromkeys([*inputs, *self.topology.activations]) if s in self.specs and self.specs[s].when == "static"]

    def refuse(self, site: Site, what: str) -> None:
        """Note a violation; those of the same wording become one line that counts its sites."""
        self.alike.setdefault(what, []).append(str(site))

    def flush(self) -> None:
        self.problems[:0] = [f"{names(sites)}: {what}" for what, sites in self.alike.items()]


def names(many: Iterable[str]) -> str:
    """ "a, b, c and 12 more" """
    listed = list(many)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more
