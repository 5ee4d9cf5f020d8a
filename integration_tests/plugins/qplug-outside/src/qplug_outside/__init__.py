"""A format with a fitted parameter, and a transform that leaves a run-time module."""

from qcore.plugins import hookimpl

QCORE_PLUGIN_API = "1"


@hookimpl
def qcore_formats():
    from qplug_outside.geometric import Geometric

    return [Geometric]


@hookimpl
def qcore_transforms():
    from qplug_outside.spread import Spread

    return [Spread]


@hookimpl
def qcore_modules():
    from qplug_outside.spread import Reflect

    return [Reflect]
