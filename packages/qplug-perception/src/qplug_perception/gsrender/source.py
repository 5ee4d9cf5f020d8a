"""Where an occupancy network comes from: `gsrender:tiny`, which is trained, `gsrender:random`, or a folder that this source wrote."""

from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from qplug_perception.gsrender.data import SceneData
from qplug_perception.gsrender.model import OccupancyConfig, OccupancyNet
from qplug_perception.network_source import NetworkSource


class GSRenderSource(NetworkSource):
    """Small occupancy networks with a Gaussian head."""

    name: ClassVar[str] = "gsrender"
    help: ClassVar[str] = "gsrender:tiny        a small occupancy network with a Gaussian head; gsrender:random[:seed]; a folder of one"
    what: ClassVar[str] = "an occupancy network"
    shipped: ClassVar[Path] = Path(__file__).parent / "weights"
    note: ClassVar[str] = "trained and evaluated on made-up streets of boxes, not on nuScenes"
    config: ClassVar[Any] = OccupancyConfig

    def build(self, config: OccupancyConfig) -> OccupancyNet:
        return OccupancyNet(config)

    def random(self, config: OccupancyConfig) -> OccupancyNet:
        model = self.build(config)
        # the statistics of trained batch norms are not 0 and 1 either
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d):
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.1, 0.5)
        return model

    def made(self, config: OccupancyConfig) -> SceneData:
        return SceneData.made(config)
