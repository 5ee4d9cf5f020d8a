"""3-D perception for qcore: detection (PETR, Q-PETR), occupancy by Gaussian splatting (GSRender), multi-view tracking (MVCTrack)."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_adapters():
    from qplug_perception.gsrender.adapter import GSRenderAdapter
    from qplug_perception.mvctrack.adapter import MVCTrackAdapter
    from qplug_perception.petr.adapter import PETRAdapter

    return [GSRenderAdapter, MVCTrackAdapter, PETRAdapter]


@hookimpl
def qcore_sources():
    from qplug_perception.gsrender.source import GSRenderSource
    from qplug_perception.mvctrack.source import MVCTrackSource
    from qplug_perception.petr.source import PETRSource

    return [GSRenderSource, MVCTrackSource, PETRSource]


@hookimpl
def qcore_formats():
    from qplug_perception.gsrender.formats import TwoRegion

    return [TwoRegion]


@hookimpl
def qcore_modules():
    from qplug_perception.petr.lookup import TableLookup
    from qplug_perception.petr.qans import StableSoftmax

    return [TableLookup, StableSoftmax]


@hookimpl
def qcore_observers():
    from qplug_perception.gsrender.formats import KnownRange
    from qplug_perception.petr.qans import SoftmaxDistance

    return [KnownRange, SoftmaxDistance]


@hookimpl
def qcore_transforms():
    from qplug_perception.petr.lookup import DULUT
    from qplug_perception.petr.qans import QANS

    return [DULUT, QANS]


@hookimpl
def qcore_tasks():
    from qplug_perception.gsrender.data import OccupancyTask
    from qplug_perception.mvctrack.data import TrackingTask
    from qplug_perception.petr.data import Detection

    return [OccupancyTask, TrackingTask, Detection]


@hookimpl
def qcore_recipes():
    from pathlib import Path

    return [Path(__file__).parent / system / "recipes" for system in ("gsrender", "mvctrack", "petr")]


@hookimpl
def qcore_commands():
    from qplug_perception.gsrender.commands import gsrender

    return [gsrender]
