"""State-space and recurrent models for qcore: Mamba and RWKV adapters, RWKVQuant, MambaQuant's transforms."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_adapters():
    from qplug_ssm.rwkv_adapter import RWKV4Adapter, RWKV6Adapter, RWKV7Adapter

    return [RWKV4Adapter, RWKV6Adapter, RWKV7Adapter]


@hookimpl
def qcore_sources():
    from qplug_ssm.rwkv_files import RWKVFiles

    return [RWKVFiles]


@hookimpl
def qcore_modules():
    from qplug_ssm.elementwise import QuantizedElementwise

    return [QuantizedElementwise]
