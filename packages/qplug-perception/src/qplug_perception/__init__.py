"""3-D perception for qcore: PETR and Q-PETR."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_adapters():
    from qplug_perception.petr.adapter import PETRAdapter

    return [PETRAdapter]


@hookimpl
def qcore_sources():
    from qplug_perception.petr.source import PETRSource

    return [PETRSource]


@hookimpl
def qcore_modules():
    from qplug_perception.petr.lookup import TableLookup
    from qplug_perception.petr.qans import StableSoftmax

    return [TableLookup, StableSoftmax]


@hookimpl
def qcore_observers():
    from qplug_perception.petr.qans import SoftmaxDistance

    return [SoftmaxDistance]


@hookimpl
def qcore_transforms():
    from qplug_perception.petr.lookup import DULUT
    from qplug_perception.petr.qans import QANS

    return [DULUT, QANS]


@hookimpl
def qcore_tasks():
    from qplug_perception.petr.data import Detection

    return [Detection]


@hookimpl
def qcore_recipes():
    from pathlib import Path

    return [Path(__file__).parent / "petr" / "recipes"]
