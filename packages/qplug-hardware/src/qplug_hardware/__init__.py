"""Number formats of accelerators for qcore: block floating point, BBFP and GSE, their packing and their recipes."""

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
