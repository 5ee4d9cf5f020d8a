"""Referring segmentation for qcore: LAVT, its data and scores, and PTQ4RIS."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_adapters():
    from qplug_segmentation.adapter import LavtAdapter

    return [LavtAdapter]


@hookimpl
def qcore_sources():
    from qplug_segmentation.source import LavtSource

    return [LavtSource]


@hookimpl
def qcore_formats():
    from qplug_segmentation.formats import DualRegion, GeluRegions, MagnitudeBands, StepGrid

    return [DualRegion, GeluRegions, MagnitudeBands, StepGrid]


@hookimpl
def qcore_observers():
    from qplug_segmentation.percentiles import BestPercentile

    return [BestPercentile]


@hookimpl
def qcore_transforms():
    from qplug_segmentation.fold import FoldDecoder

    return [FoldDecoder]


@hookimpl
def qcore_solvers():
    from qplug_segmentation.solvers import AffineSearch, GivenScales

    return [AffineSearch, GivenScales]


@hookimpl
def qcore_allocators():
    from qplug_segmentation.allocator import PTQ4RIS

    return [PTQ4RIS]


@hookimpl
def qcore_tasks():
    from qplug_segmentation.task import ReferringSegmentation

    return [ReferringSegmentation]


@hookimpl
def qcore_recipes():
    from pathlib import Path

    return [Path(__file__).parent / "recipes"]
