"""The adapter of the voxel tracker."""

from typing import ClassVar

from qcore.model.adapter import ModelAdapter
from qcore.model.topology import Topology
from torch import nn

from qplug_perception.mvctrack.tracker import MVCTracker
from qplug_perception.parts import Parts

_MASK = "a mask of occupied voxels lies between; nobody worked out links through it"


class MVCTrackAdapter(ModelAdapter):
    """Voxel trackers: the masked encoder, the BEV head, the MLPs.  Links are those inside the BEV head and the MLPs, as traced."""

    name: ClassVar[str] = "mvctrack"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, MVCTracker)

    def topology(self, model: nn.Module) -> Topology:
        assert isinstance(model, MVCTracker)
        parts = Parts(model)
        for path, module in model.encoder.named_modules(prefix="encoder"):
            if isinstance(module, nn.Conv3d):
                parts.alone(path, _MASK)
        for path in ("bev", *(["size"] if model.size is not None else []), "mlp"):
            parts.traced(path)
        return parts.topology()
