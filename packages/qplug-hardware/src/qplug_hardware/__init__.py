"""Number formats of accelerators for qcore (block floating point, BBFP, GSE), their packing and recipes, and a simulator of NVR prefetching."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_formats():
    from qplug_hardware.block_float import BBFP, BFP, SharedExponent

    return [BBFP, BFP, SharedExponent]


@hookimpl
def qcore_packings():
    from qplug_hardware.stream import BlockStream

    return [BlockStream]


@hookimpl
def qcore_recipes():
    from pathlib import Path

    return [Path(__file__).parent / "recipes"]


@hookimpl
def qcore_commands():
    from qplug_hardware.nvr.commands import nvr

    return [nvr]
