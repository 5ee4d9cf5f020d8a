"""Where a tracker comes from: `mvctrack:tiny`, which is trained, `mvctrack:random`, or a folder that this source wrote."""

from pathlib import Path
from typing import Any, ClassVar

from qplug_perception.mvctrack.data import TrackingData
from qplug_perception.mvctrack.tracker import MVCTracker, TrackerConfig
from qplug_perception.network_source import NetworkSource


class MVCTrackSource(NetworkSource):
    """Small voxel trackers."""

    name: ClassVar[str] = "mvctrack"
    help: ClassVar[str] = "mvctrack:tiny        a small voxel tracker of one object; mvctrack:random[:seed]; a folder of one"
    what: ClassVar[str] = "a tracker"
    shipped: ClassVar[Path] = Path(__file__).parent / "weights"
    note: ClassVar[str] = "trained and evaluated on made-up sequences of a cuboid, not on nuScenes"
    config: ClassVar[Any] = TrackerConfig

    def build(self, config: TrackerConfig) -> MVCTracker:
        return MVCTracker(config)

    def made(self, config: TrackerConfig) -> TrackingData:
        return TrackingData.made(config)
