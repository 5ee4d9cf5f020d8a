"""qcore plug-in for number formats and packings of accelerators, and simulators of them."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_commands():
    from qplug_hardware.nvr.commands import nvr

    return [nvr]
