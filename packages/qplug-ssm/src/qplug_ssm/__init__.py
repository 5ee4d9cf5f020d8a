"""State-space and recurrent models for qcore: Mamba and RWKV adapters, RWKVQuant, MambaQuant's transforms."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_adapters():
    from qplug_ssm.mamba_adapter import MambaAdapter
    from qplug_ssm.rwkv_adapter import RWKV4Adapter, RWKV6Adapter, RWKV7Adapter

    return [MambaAdapter, RWKV4Adapter, RWKV6Adapter, RWKV7Adapter]


@hookimpl
def qcore_sources():
    from qplug_ssm.rwkv_files import RWKVFiles
    from qplug_ssm.typeseg import TypeSegFile

    return [RWKVFiles, TypeSegFile]


@hookimpl
def qcore_modules():
    from qplug_ssm.centre import SubtractMean
    from qplug_ssm.elementwise import QuantizedElementwise
    from qplug_ssm.readout import RotatedReadout, SmoothSiLU

    return [QuantizedElementwise, RotatedReadout, SmoothSiLU, SubtractMean]


@hookimpl
def qcore_observers():
    from qplug_ssm.codebooks import ClippedSquare
    from qplug_ssm.covariance import Covariance

    return [ClippedSquare, Covariance]


@hookimpl
def qcore_transforms():
    from qplug_ssm.centre import CentreDelta
    from qplug_ssm.gain import GainSmooth
    from qplug_ssm.klt import KLTRotate
    from qplug_ssm.mambaquant import MambaSmooth, StateRotate

    return [CentreDelta, GainSmooth, KLTRotate, MambaSmooth, StateRotate]


@hookimpl
def qcore_solvers():
    from qplug_ssm.codebooks import WeightedCodebook

    return [WeightedCodebook]


@hookimpl
def qcore_allocators():
    from qplug_ssm.rwkvquant import RWKVQuant

    return [RWKVQuant]


@hookimpl
def qcore_recipes():
    from importlib.resources import files

    return [files("qplug_ssm") / "recipes"]


@hookimpl
def qcore_kernels():
    from qplug_ssm.kernels import CodebookLinear

    return [CodebookLinear]
