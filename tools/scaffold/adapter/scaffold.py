from itertools import pairwise
from typing import ClassVar

from qcore.model import Block, Invariance, Link, ModelAdapter, Port, Site, Topology
from torch import nn


class Scaffold(ModelAdapter):
    """Linear layers one after another, with ReLU between."""

    name: ClassVar[str] = "scaffold"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, nn.Sequential) and {type(m) for m in model} == {nn.Linear, nn.ReLU}

    def topology(self, model: nn.Module) -> Topology:
        layers = {name: m for name, m in model.named_children() if isinstance(m, nn.Linear)}
        names = list(layers)

        def written_by(name: str) -> tuple[Port, ...]:
            return tuple(Port(f"{name}.{own}", "out") for own, _ in layers[name].named_parameters())  # weight, and bias if there is one

        # ReLU lets each channel be scaled by a positive number and change its place; a rotation would mix signs
        links = tuple(
            Link(
                name=f"{a} → {b}",
                size=layers[a].out_features,
                writes=written_by(a),
                reads=(Port(f"{b}.weight", "in"),),
                invariance=Invariance.SCALE | Invariance.PERMUTE,
            )
            for a, b in pairwise(names)
        )
        blocked = {Port(f"{names[0]}.weight", "in"): "what the model is given"}
        blocked |= dict.fromkeys(written_by(names[-1]), "what the model returns")
        return Topology(blocks=tuple(Block(name, ((Site(name),),), feed="rerun") for name in names), links=links, blocked=blocked)
