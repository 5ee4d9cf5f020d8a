"""I-LLM: decoder language models as programs of integers.  This module is the registration; what it names is imported when it is first asked for."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.plugins import hookimpl

if TYPE_CHECKING:
    from qplug_llm.illm.decoder import PAPER, IntegerCache, IntegerDecoder, Widths
    from qplug_llm.illm.lowering import ILLM, lower

_WHERE = {"ILLM": "lowering", "IntegerCache": "decoder", "IntegerDecoder": "decoder", "PAPER": "decoder", "Widths": "decoder", "lower": "lowering"}

__all__ = ["ILLM", "PAPER", "IntegerCache", "IntegerDecoder", "Widths", "lower"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


@hookimpl
def qcore_lowerings():
    from qplug_llm.illm.lowering import ILLM

    return [ILLM]


@hookimpl
def qcore_transforms():
    from qplug_llm.illm.swiglu_smooth import SwiGLUSmooth

    return [SwiGLUSmooth]


@hookimpl
def qcore_modules():
    from qplug_llm.illm.swiglu_smooth import SplitSiLU

    return [SplitSiLU]


@hookimpl
def qcore_recipes():
    return [Path(__file__).parent / "recipes"]
