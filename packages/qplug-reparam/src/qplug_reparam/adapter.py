"""The adapter of networks whose blocks of branches were fused: RepVGG, MobileOne, RepViT and whatever is built alike."""

from typing import ClassVar

from qcore.model.adapter import ModelAdapter
from qcore.model.plain import plain_topology
from qcore.model.topology import Topology
from torch import nn

from qplug_reparam.branches import FUSED, find_branches
from qplug_reparam.fuse import require_fused


class Reparam(ModelAdapter):
    """Convolutional networks whose branches are fused (`qplug_reparam.fuse`, timm's own `reparam_conv`); with branches they are refused.

    Sites and links are those that the traced network shows: blocks, squeeze-and-excitation and heads alike.
    """

    name: ClassVar[str] = "reparam"

    def matches(self, model: nn.Module) -> bool:
        if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
            return False
        fused = any(path.rpartition(".")[2].startswith(FUSED) and isinstance(m, nn.Conv2d) for path, m in model.named_modules())
        return fused or bool(find_branches(model))

    def prepare(self, model: nn.Module) -> None:
        require_fused(model)

    def topology(self, model: nn.Module) -> Topology:
        return plain_topology(model)
