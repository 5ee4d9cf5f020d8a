"""qcore plug-in for 3-D perception: occupancy by Gaussian splatting (GSRender), multi-view tracking (MVCTrack)."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_adapters():
    from qplug_perception.gsrender.adapter import GSRenderAdapter
    from qplug_perception.mvctrack.adapter import MVCTrackAdapter

    return [GSRenderAdapter, MVCTrackAdapter]


@hookimpl
def qcore_sources():
    from qplug_perception.gsrender.source import GSRenderSource
    from qplug_perception.mvctrack.source import MVCTrackSource

    return [GSRenderSource, MVCTrackSource]


@hookimpl
def qcore_formats():
    from qplug_perception.gsrender.formats import TwoRegion

    return [TwoRegion]


@hookimpl
def qcore_observers():
    from qplug_perception.gsrender.formats import KnownRange

    return [KnownRange]


@hookimpl
def qcore_tasks():
    from qplug_perception.gsrender.data import OccupancyTask
    from qplug_perception.mvctrack.data import TrackingTask

    return [OccupancyTask, TrackingTask]


@hookimpl
def qcore_recipes():
    from pathlib import Path

    return [Path(__file__).parent / system / "recipes" for system in ("gsrender", "mvctrack")]


@hookimpl
def qcore_commands():
    from qplug_perception.gsrender.commands import gsrender

    return [gsrender]
