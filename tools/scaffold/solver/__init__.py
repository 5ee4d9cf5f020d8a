"""What this plug-in adds to qcore."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_solvers():
    from qplug_scaffold.scaffold import Scaffold

    return [Scaffold]
