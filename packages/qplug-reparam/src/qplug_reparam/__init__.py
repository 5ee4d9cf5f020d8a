"""Re-parameterized networks for qcore: RepVGG, MobileOne, RepViT and their kin; branches fused into one convolution, and CFWS."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_adapters():
    from qplug_reparam.adapter import Reparam

    return [Reparam]


@hookimpl
def qcore_sources():
    from qplug_reparam.timm_source import TimmSource

    return [TimmSource]


@hookimpl
def qcore_transforms():
    from qplug_reparam.cfws import CFWS

    return [CFWS]


@hookimpl
def qcore_observers():
    from qplug_reparam.metrics import ImprovedKL

    return [ImprovedKL]


@hookimpl
def qcore_recipes():
    from pathlib import Path

    return [Path(__file__).parent / "recipes"]


@hookimpl
def qcore_commands():
    from qplug_reparam.commands import reparam

    return [reparam]
