"""All that qcore knows of a model family.  By structure, not by a list of names."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from qcore.errors import NotFound
from qcore.model.tap import RunContext
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec

Batch = Any


class ModelAdapter(Protocol):
    """How a family is laid out, run and compared.  Inherit for the defaults.

    name:     lower case
    priority: where several match, the highest is taken; equal ones are an error that names both
    """

    name: ClassVar[str]
    priority: ClassVar[int] = 0

    def matches(self, model: nn.Module) -> bool:
        """Whether this adapter understands `model`; looks at structure, not at weights (they may be on meta)."""

    def topology(self, model: nn.Module) -> Topology:
        """Blocks, links and blocked axes; every in- and out-axis of every weight is in a link, or blocked with a reason."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """One forward pass; what KL, the contract test, the proof and the attribution compare."""
        return model(batch)

    def prepare(self, model: nn.Module) -> None:
        """Rewrite `model` in place so that all its sites can be reached; never renames a parameter that a checkpoint keeps."""

    def context(self, batch: Batch) -> RunContext:
        """Padding, modality and order of one batch."""
        return RunContext()

    def problems(self, model: nn.Module, specs: Mapping[Site, QuantSpec]) -> list[str]:
        """What stands against these specs for reasons that only the model knows, a sentence each: the place, both values, the next step."""
        return []


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameters that are one object under two names: each later name → the first.  For `Topology.ties`."""
    first: dict[int, str] = {}
    ties = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(param), name) != name:
            ties[name] = first[id(param)]
    return ties


def adapter_for(model: nn.Module, adapters: Mapping[str, type], name: str | None = None) -> ModelAdapter:
    """The adapter that understands `model`, or the named one."""
    if name is not None:
        return adapters[name]()
    fits = [adapter for cls in adapters.values() if (adapter := cls()).matches(model)]
    best = [a for a in fits if a.priority == max(f.priority for f in fits)]
    if len(best) == 1:
        return best[0]
    if not fits:
        known = ", ".join(sorted(adapters)) or "none"
        raise NotFound(
            f"no adapter understands {type(model).__name__}; have: {known}\n"
            "install the plug-in for its family (`qcore plugins list`), for language models: pip install qplug-llm; or write one: docs/add/adapter.md"
        )
    raise NotFound(f"{len(best)} adapters match {type(model).__name__}: {', '.join(a.name for a in best)}; choose one with adapter=")
