"""qcore plug-in for 3-D perception: occupancy by Gaussian splatting (GSRender), multi-view tracking (MVCTrack)."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_adapters():
    from qplug_perception.gsrender.adapter import GSRenderAdapter

    return [GSRenderAdapter]


@hookimpl
def qcore_sources():
    from qplug_perception.gsrender.source import GSRenderSource

    return [GSRenderSource]


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

    return [OccupancyTask]


@hookimpl
def qcore_recipes():
    from pathlib import Path

    return [Path(__file__).parent / "recipes"]


@hookimpl
def qcore_commands():
    from qplug_perception.gsrender.commands import gsrender

    return [gsrender]
